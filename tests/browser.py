"""JupyterLab in headless Chromium: what a reader's browser does with a notebook."""

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

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# No sandbox, because a container's root may not make one; the rest keeps Chromium from looking for the network.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 60  # to wait for a server, a page or a kernel before giving up
KERNEL_IS_IDLE = """() => {
    const notebook = window.jupyterapp && window.jupyterapp.shell.currentWidget;
    const session = notebook && notebook.sessionContext && notebook.sessionContext.session;
    return session && session.kernel && session.kernel.status === 'idle';
}"""


@contextmanager
def jupyter_lab(folder):
    """Serves `folder` with this very Python; yields a function that gives the address of a notebook. No setting of the user is read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="jupyterlab-", ignore_cleanup_errors=True) as home:
        home = Path(home)
        settings = home / "config" / "labconfig" / "page_config.json"
        settings.parent.mkdir(parents=True)
        # The question whether to fetch Jupyter's news would lie above the notebook.
        settings.write_text(
            json.dumps(
                {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
            )
        )
        whole = (
            home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
        )
        whole.parent.mkdir(parents=True)
        whole.write_text(
            json.dumps({"windowingMode": "none"})
        )  # cells out of sight are in the page too
        folders = {
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "IPYTHONDIR": "ipython",
        }
        folders |= {
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        }
        environment = {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"}
        environment |= {name: str(home / place) for name, place in folders.items()} | {
            "JUPYTER_PREFER_ENV_PATH": "1"
        }
        options = [
            "--no-browser",
            "--allow-root",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0",
        ]
        options += [
            f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={folder}",
            "--LabApp.expose_app_in_browser=True",
        ]
        log = home / "log.txt"
        with log.open("w") as output:
            command = [sys.executable, "-m", "jupyterlab", *options]
            server = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
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


def wait_for_server(address, server, log):
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
    """A page of headless Chromium, and the list of errors its scripts raise."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            page, errors = (
                browser.new_context(viewport={"width": 1280, "height": 900}).new_page(),
                [],
            )
            page.on("pageerror", lambda error: errors.append(str(error)))
            yield page, errors
        finally:
            browser.close()


def open_notebook(page, address):
    """Opens a notebook and waits until its kernel can run a cell."""
    page.goto(address)
    page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=SECONDS * 1000)
    page.locator(".jp-Notebook").first.wait_for(timeout=SECONDS * 1000)
    page.wait_for_function(KERNEL_IS_IDLE, timeout=SECONDS * 1000)


def run_all(page):
    """Runs every cell and waits for the last; AssertionError with what went wrong in one."""
    command(page, "notebook:run-all-cells")
    page.wait_for_function(KERNEL_IS_IDLE, timeout=SECONDS * 1000)
    wrong = page.locator(
        '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]'
    ).all_inner_texts()
    assert not wrong, wrong[0]


def output(page, cell):
    """The outputs of code cell number `cell`, from 0."""
    return page.locator(".jp-CodeCell").nth(cell).locator(".jp-OutputArea-output")


def command(page, name, **arguments):
    """Runs one of JupyterLab's commands, such as notebook:run-all-cells, and waits for its end."""
    page.evaluate(
        "([name, arguments]) => window.jupyterapp.commands.execute(name, arguments).then(() => null)",
        [name, arguments],
    )


def shut_in(page, *known):
    """Lets `page` ask for nothing but addresses that begin as one of `known`.

    Returns two lists that fill: what else it asked for, and the dialogs it opened. What a page carries in itself is no request.
    """
    asked, dialogs = [], []

    def is_known(address):
        return re.sub("^ws", "http", address).startswith((*known, "data:", "blob:", "about:"))

    def hear(address):
        if not is_known(address):
            asked.append(address)

    def close(dialog):
        dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("request", lambda request: hear(request.url))
    page.on("websocket", lambda socket: hear(socket.url))
    page.on("dialog", close)
    page.route(
        "**/*", lambda route: route.continue_() if is_known(route.request.url) else route.abort()
    )
    return asked, dialogs


def injected(page):
    """What scripts have left in `window.injected`, in `page` and in every frame in it."""
    found = []
    for frame in page.frames:
        with suppress(Error):  # a frame that is just leaving
            found.append(frame.evaluate("window.injected"))
    return {value for value in found if value is not None}


def new_notebook(file, cells):
    """Writes a notebook of code `cells` to `file`, after one that finds this repository, and returns `file`."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})", *cells]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel
        ),
        file,
    )
    return file
