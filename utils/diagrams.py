"""Draw diagrams that carry an idea, in one style: boxes, arrows between them, a few words.

Positions count in units of a canvas that is `width` by `height`. Every function returns its figure.
"""

from matplotlib.patches import FancyBboxPatch, Rectangle

from utils.plots import BLUE, GRAY, GREEN, VERMILION, new_figure

PALE = {BLUE: "#BBD6F0", GREEN: "#CDEBDF", VERMILION: "#F8DCC8", GRAY: "white"}


def new_canvas(width, height):
    """Return a figure of `width` by `height` hundred pixels, and its empty Axes."""
    figure, axes = new_figure(height=height)
    figure.set_figwidth(width)
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    axes.set_position([0, 0, 1, 1])
    return figure, axes


def write(axes, x, y, text, color="black", size=9.5, **style):
    """Write `text` centered at (x, y). Between two $ it is a formula."""
    style.setdefault("ha", "center")
    axes.text(x, y, text, color=color, fontsize=size, va="center", parse_math="$" in text, **style)


def box(axes, x, y, width, height, text="", color=GRAY, dashed=False, size=9.5):
    """Draw a box with its lower left corner at (x, y) and `text` in its middle."""
    patch = FancyBboxPatch(
        (x + 0.05, y + 0.05),
        width - 0.1,
        height - 0.1,
        boxstyle="round,pad=0.05",
        facecolor="white" if dashed else PALE[color],
        edgecolor=color,
        linestyle="--" if dashed else "-",
        linewidth=1.2,
    )
    axes.add_patch(patch)
    if text:
        write(axes, x + width / 2, y + height / 2, text, size=size)


def arrow(axes, start, end, color=GRAY, style="-"):
    """Draw an arrow from the point `start` to the point `end`."""
    shape = {"arrowstyle": "->", "color": color, "linewidth": 1.4, "linestyle": style}
    axes.annotate("", xy=end, xytext=start, arrowprops=shape)


def one_pair():
    """Draw a preference pair: one image, one question, two answers."""
    figure, axes = new_canvas(8, 2.3)
    axes.add_patch(Rectangle((0.2, 0.55), 1.5, 1.3, facecolor="#FFFBE6", edgecolor=GRAY))
    axes.add_patch(Rectangle((0.55, 0.75), 0.35, 0.5, facecolor=VERMILION))
    write(axes, 0.95, 0.3, "image")
    box(axes, 2.1, 0.8, 1.6, 0.8, "question\nWhat do you see?")
    arrow(axes, (1.75, 1.2), (2.1, 1.2))
    box(axes, 4.3, 1.25, 3.5, 0.8, "chosen\nA red cup on the left.", GREEN)
    box(axes, 4.3, 0.2, 3.5, 0.8, "rejected\nA red cup on the left and a book.", VERMILION)
    arrow(axes, (3.72, 1.35), (4.3, 1.65), GREEN)
    arrow(axes, (3.72, 1.05), (4.3, 0.6), VERMILION)
    return figure


def image_tokens():
    """Draw how a prompt with an image and two answers become two rows of tokens."""
    figure, axes = new_canvas(9.6, 3.5)
    box(axes, 0.2, 2.75, 5.0, 0.55, "User:<image>What do you see?<end>  Assistant:")
    write(axes, 0.2, 2.45, "text: one <image>", GRAY, ha="left")
    arrow(axes, (2.6, 2.72), (2.6, 2.2))
    rows = (("chosen", 1.45, GREEN, "A red cup . <end>"), ("rejected", 0.6, VERMILION, "A cup and"))
    for name, y, color, answer in rows:
        write(axes, 0.15, y + 0.25, name, color, ha="left")
        box(axes, 1.05, y, 0.65, 0.5, "User:")
        x = 1.72
        for _ in range(6):
            box(axes, x, y, 0.32, 0.5, color=BLUE)
            x += 0.32
        box(axes, x, y, 2.3, 0.5, "What do you see ? …")
        x += 2.32
        words = [*answer.split(), *(["a", "book", ".", "<end>"] if name == "rejected" else [])]
        for word in words:
            width = 0.62 if word == "<end>" else 0.47
            box(axes, x, y, width, 0.5, word, color, size=9)
            x += width
    write(axes, 2.68, 2.08, "tokens that stand for the image", BLUE)
    write(axes, 3.5, 0.3, "prompt: the same in both rows")
    write(axes, 7.6, 0.3, "answer: only these count in the loss")
    return figure


def policy_and_reference():
    """Draw one model that is policy and reference, and how its log-probabilities become a loss."""
    figure, axes = new_canvas(9.6, 3.4)
    box(axes, 0.2, 2.0, 1.7, 0.9, "policy\nadapter on", BLUE)
    box(axes, 0.2, 0.6, 1.7, 0.9, "reference\nadapter off")
    write(axes, 1.05, 1.75, "one model", GRAY, style="italic")
    values = (
        (2.3, 2.45, r"$\log\,\pi_\theta$(chosen)", GREEN),
        (2.3, 1.9, r"$\log\,\pi_\theta$(rejected)", VERMILION),
        (2.3, 1.05, r"$\log\,\pi_{ref}$(chosen)", GREEN),
        (2.3, 0.5, r"$\log\,\pi_{ref}$(rejected)", VERMILION),
    )
    for x, y, text, color in values:
        box(axes, x, y, 1.85, 0.5, text, color)
    arrow(axes, (1.92, 2.45), (2.28, 2.45), BLUE)
    arrow(axes, (1.92, 1.05), (2.28, 1.05))
    box(axes, 4.85, 2.0, 2.0, 0.75, "reward of chosen\n$\\beta$ × difference", GREEN)
    box(axes, 4.85, 0.75, 2.0, 0.75, "reward of rejected\n$\\beta$ × difference", VERMILION)
    for y in (2.7, 1.3):
        arrow(axes, (4.17, y), (4.83, 2.4), GREEN)
    for y in (2.15, 0.75):
        arrow(axes, (4.17, y), (4.83, 1.12), VERMILION)
    box(axes, 7.25, 1.4, 1.0, 0.7, "margin")
    arrow(axes, (6.87, 2.3), (7.25, 1.9), GREEN)
    arrow(axes, (6.87, 1.15), (7.25, 1.6), VERMILION)
    write(axes, 7.2, 2.25, "+", GREEN, size=12)
    write(axes, 7.2, 1.25, "−", VERMILION, size=12)
    arrow(axes, (8.27, 1.75), (8.55, 1.75))
    box(axes, 8.55, 1.4, 0.95, 0.7, "loss", BLUE)
    return figure


def four_bit_and_trained():
    """Draw the parts of a model: what is in 4 bits, what is frozen, and what trains."""
    figure, axes = new_canvas(9.6, 2.7)
    box(axes, 0.2, 1.1, 1.7, 0.9, "vision tower")
    box(axes, 2.3, 1.1, 1.6, 0.9, "connector")
    box(axes, 4.3, 1.1, 2.7, 0.9, "language model\nin 4 bits", BLUE)
    box(axes, 7.4, 1.1, 1.2, 0.9, "head")
    box(axes, 4.7, 0.2, 0.8, 0.55, "$A$", GREEN)
    box(axes, 5.8, 0.2, 0.8, 0.55, "$B$", GREEN)
    for start, end in ((1.92, 2.28), (3.92, 4.28), (7.02, 7.38)):
        arrow(axes, (start, 1.55), (end, 1.55))
    arrow(axes, (5.1, 1.08), (5.1, 0.77), GREEN)
    arrow(axes, (5.52, 0.47), (5.78, 0.47), GREEN)
    arrow(axes, (6.2, 0.77), (6.2, 1.08), GREEN)
    write(axes, 1.05, 2.2, "image", GRAY)
    write(axes, 5.65, 2.2, "question and answer", GRAY)
    write(axes, 8.0, 2.2, "next token", GRAY)
    write(axes, 2.1, 0.75, "white and blue: frozen", GRAY)
    write(axes, 8.0, 0.47, "green: the adapter, the only\npart that trains, in float32", GREEN)
    return figure


def paired_comparison():
    """Draw how two models are compared on the same scenes."""
    figure, axes = new_canvas(9.6, 2.7)
    box(axes, 0.2, 0.9, 1.5, 0.9, "500 scenes\nwith their truth")
    rows = (("base", 1.55, GRAY, "adapter off"), ("tuned", 0.25, BLUE, "adapter on"))
    for name, y, color, how in rows:
        box(axes, 2.2, y, 1.4, 0.9, f"{name}\n{how}", color)
        box(axes, 4.0, y, 1.2, 0.9, "answers", color)
        box(axes, 5.6, y, 1.6, 0.9, "what is wrong\nin each scene", color)
        arrow(axes, (1.72, 1.35), (2.18, y + 0.45), color)
        arrow(axes, (3.62, y + 0.45), (3.98, y + 0.45), color)
        arrow(axes, (5.22, y + 0.45), (5.58, y + 0.45), color)
        arrow(axes, (7.22, y + 0.45), (7.68, 1.35), color)
    box(axes, 7.7, 0.9, 1.7, 0.9, "difference,\nscene by scene", GREEN)
    write(axes, 8.55, 0.6, "with its interval", GREEN)
    return figure


def derivation():
    """Draw the five steps from preferences to the DPO loss."""
    figure, axes = new_canvas(9.6, 2.2)
    steps = (
        ("1 Bradley–Terry", r"$p(y_w \succ y_l)$" + "\n" + r"$= \sigma(r_w - r_l)$"),
        ("2 objective", r"$\max\ E[r] -$" + "\n" + r"$\beta\,KL(\pi\,\|\,\pi_{ref})$"),
        ("3 its optimum", r"$\pi^* = \pi_{ref}\, e^{r/\beta} / Z$"),
        ("4 the reward", r"$r = \beta\,\log(\pi^* / \pi_{ref})$" + "\n" + r"$+\ \beta\,\log Z$"),
        ("5 the loss", r"$-\log\,\sigma($margin$)$" + "\nno reward, no $Z$"),
    )
    x = 0.1
    for number, (title, formula) in enumerate(steps):
        color = BLUE if number == len(steps) - 1 else GRAY
        box(axes, x, 0.45, 1.65, 1.0, formula, color)
        write(axes, x + 0.82, 1.7, title, color if color == BLUE else "black")
        if number:
            arrow(axes, (x - 0.27, 0.95), (x + 0.02, 0.95))
        x += 1.92
    return figure


def memory_parts():
    """Draw what a training step holds in memory, by what decides its size."""
    figure, axes = new_canvas(9.6, 2.2)
    groups = (
        ("decided by the model", GRAY, ("weights: 4 or 16 bits",)),
        ("decided by the adapter", GREEN, ("adapter", "gradients", "optimizer state")),
        ("decided by the batch", BLUE, ("activations", "logits")),
    )
    x = 0.2
    for title, color, parts in groups:
        start = x
        for part in parts:
            width = 1.8 if ":" in part else 1.28
            box(axes, x, 0.5, width, 0.75, part, color)
            x += width + 0.05
        write(axes, (start + x) / 2, 1.55, title, color)
        x += 0.3
    return figure


def course():
    """Draw how the notebooks connect."""
    figure, axes = new_canvas(9.6, 4.0)
    main = ("01 inspect", "02 format", "03 train", "04 compare")
    write(axes, 0.2, 3.75, "the course, in one sitting", BLUE, ha="left")
    for number, name in enumerate(main):
        x = 0.2 + 2.4 * number
        box(axes, x, 2.85, 1.9, 0.65, name, BLUE)
        if number:
            arrow(axes, (x - 0.48, 3.17), (x - 0.02, 3.17), BLUE)
    write(axes, 0.2, 2.35, "explained and questioned", GREEN, ha="left")
    explained = (
        ("05 the loss", False),
        ("06 memory", False),
        ("07 settings", True),
        ("08 the image", True),
        ("09 methods", True),
    )
    for number, (name, dashed) in enumerate(explained):
        box(axes, 0.2 + 1.88 * number, 1.5, 1.6, 0.6, name, GREEN, dashed)
    arrow(axes, (5.6, 2.83), (4.5, 2.15), GREEN)
    write(axes, 9.4, 2.35, "dashed: still to be written", GRAY, ha="right")
    write(axes, 0.2, 1.0, "your own work", VERMILION, ha="left")
    own = ("10 own pairs", "11 benchmarks", "12 faster", "13 scale, share")
    for number, name in enumerate(own):
        box(axes, 0.2 + 2.4 * number, 0.15, 1.9, 0.6, name, VERMILION)
    return figure
