"""Run JupyterLab in headless Chromium: what a reader's browser does with a notebook."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).parents[1]
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
# No sandbox, because a container's root may not make one. The rest keeps Chromium from looking for
# the network.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 1800  # to wait for a server, a page or a kernel before giving up; machines may be slow
KERNEL_IS_IDLE = """() => {
    const notebook = window.jupyterapp && window.jupyterapp.shell.currentWidget;
    const session = notebook && notebook.sessionContext && notebook.sessionContext.session;
    return session && session.kernel && session.kernel.status === 'idle';
}"""


@contextmanager
def jupyter_lab(folder):
    """Serve `folder` with this very Python; yield a function that gives a notebook's address.

    None of the user's settings is read.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="jupyterlab-", ignore_cleanup_errors=True) as home:
        home = Path(home)
        write_settings(home)
        log = home / "log.txt"
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={folder}",
            f"--IdentityProvider.token={token}",
            "--LabApp.expose_app_in_browser=True",
        ]
        with log.open("w") as output:
            server = subprocess.Popen(
                command, env=environment(home), stdout=output, stderr=subprocess.STDOUT
            )
        try:
            wait_for_server(f"{address}/api?token={token}", server, log)
            yield lambda name: f"{address}/lab/tree/{name}?token={token}&reset"
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def write_settings(home):
    """Write the settings of JupyterLab that the tests need to the folder `home`."""
    # The question whether to fetch Jupyter's news would lie above the notebook.
    page = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    file = home / "config" / "labconfig" / "page_config.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(page))
    # Cells that are out of sight are in the page too.
    notebook = {"windowingMode": "none"}
    file = home / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(notebook))


def environment(home):
    """Return the environment in which JupyterLab keeps all of its folders in `home`."""
    variables = {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"}
    variables["JUPYTER_CONFIG_DIR"] = str(home / "config")
    variables["JUPYTER_DATA_DIR"] = str(home / "data")
    variables["JUPYTER_RUNTIME_DIR"] = str(home / "runtime")
    variables["IPYTHONDIR"] = str(home / "ipython")
    variables["JUPYTERLAB_SETTINGS_DIR"] = str(home / "settings")
    variables["JUPYTERLAB_WORKSPACES_DIR"] = str(home / "workspaces")
    variables["JUPYTER_PREFER_ENV_PATH"] = "1"
    return variables


def wait_for_server(address, server, log):
    """Wait until the `server` answers at `address`; RuntimeError with its log if it does not."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start within {SECONDS} s:\n{log.read_text()[-2000:]}")


@contextmanager
def browser_page():
    """Yield a page of headless Chromium, and the list of errors that its scripts raise."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=FLAGS, timeout=SECONDS * 1000
        )
        try:
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            context.set_default_timeout(SECONDS * 1000)
            page = context.new_page()
            errors = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            yield page, errors
        finally:
            browser.close()


def open_notebook(page, address):
    """Open a notebook and wait until its kernel can run a cell."""
    page.goto(address)
    page.wait_for_selector("#jupyterlab-splash", state="detached")
    page.locator(".jp-Notebook").first.wait_for()
    page.wait_for_function(KERNEL_IS_IDLE)


def run_all(page):
    """Run every cell and wait for the last; AssertionError with what went wrong in one."""
    command(page, "notebook:run-all-cells")
    page.wait_for_function(KERNEL_IS_IDLE)
    # JupyterLab gives a traceback the type of what is printed to stderr.
    printed = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
    for text in printed:
        assert "Traceback" not in text, text


def output(page, cell):
    """Return the outputs of code cell number `cell`, from 0."""
    return page.locator(".jp-CodeCell").nth(cell).locator(".jp-OutputArea-output")


def command(page, name, **arguments):
    """Run one of JupyterLab's commands, such as notebook:run-all-cells, and wait for its end."""
    page.evaluate(
        """([name, arguments]) =>
            window.jupyterapp.commands.execute(name, arguments).then(() => null)""",
        [name, arguments],
    )


def shut_in(page, *known):
    """Let `page` ask for nothing but addresses that begin like one of `known`.

    Return two lists that fill: what else it asked for, and the dialogs it opened. What a page
    carries in itself is no request.
    """
    asked = []
    dialogs = []
    allowed = (*known, "data:", "blob:", "about:")

    def is_known(address):
        return re.sub("^ws", "http", address).startswith(allowed)

    def hear(address):
        if not is_known(address):
            asked.append(address)

    def close(dialog):
        dialogs.append(dialog.message)
        dialog.dismiss()

    def answer(route):
        if is_known(route.request.url):
            route.continue_()
        else:
            route.abort()

    page.on("request", lambda request: hear(request.url))
    page.on("websocket", lambda socket: hear(socket.url))
    page.on("dialog", close)
    page.route("**/*", answer)
    return asked, dialogs


def injected(page):
    """Return what scripts have left in `window.injected`, in `page` and in every frame in it."""
    found = set()
    for frame in page.frames:
        with suppress(Error):  # a frame that is just leaving
            value = frame.evaluate("window.injected")
            if value is not None:
                found.add(value)
    return found


def new_notebook(file, cells):
    """Write a notebook of code `cells` to `file`, after one that finds this repository.

    Return `file`.
    """
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    setup = f"import sys\nsys.path.insert(0, {str(ROOT)!r})"
    code_cells = [nbformat.v4.new_code_cell(cell) for cell in [setup, *cells]]
    nbformat.write(nbformat.v4.new_notebook(cells=code_cells, metadata=kernel), file)
    return file
