"""Draw a scene: everyday objects in flat colors on a 3 × 3 grid.

The images are large enough to enjoy and clear enough to see at 72 pixels.
"""

import math

from PIL import Image, ImageDraw

SIDE = 216  # pixels of the finished image; a cell of the grid is 72 × 72
OVERSAMPLING = 3  # draw large, then shrink: Pillow's shapes have no smooth edges of their own

COLORS = {
    "red": (214, 54, 54),
    "yellow": (240, 196, 32),
    "green": (54, 158, 74),
    "blue": (48, 104, 210),
    "purple": (136, 70, 170),
    "pink": (244, 140, 184),
}
INK = (58, 54, 60)
PAPER = (252, 250, 244)
WOOD = (134, 96, 62)
LEAF = (84, 140, 70)


def shade(color, amount):
    """Mix `color` with white where `amount` > 0, with black where it is < 0."""
    target = 255 if amount > 0 else 0
    return tuple(round(value + (target - value) * abs(amount)) for value in color)


class Pen:
    """Draws in a square that reaches from −1 to 1 around (x, y), whatever its size in pixels."""

    def __init__(self, canvas, x, y, radius):
        self.canvas = canvas
        self.x = x
        self.y = y
        self.radius = radius

    def points(self, numbers):
        """Return the pixels of the points x, y, x, y, … in `numbers`."""
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return [(self.x + a * self.radius, self.y + b * self.radius) for a, b in pairs]

    def shape(self, kind, numbers, fill=None, line=None, width=0.07, **more):
        """Draw Pillow's shape `kind`. `width`: that of its line, in units of the square."""
        points = self.points(numbers)
        pixels = max(1, round(width * self.radius))
        if kind == "line":
            self.canvas.line(points, fill=line, width=pixels, joint="curve")
        elif kind == "arc":
            self.canvas.arc(points, fill=line, width=pixels, **more)
        else:
            draw_shape = getattr(self.canvas, kind)
            draw_shape(points, fill=fill, outline=line, width=pixels, **more)


def draw_cup(pen, color, dark, light):
    pen.shape("ellipse", (0.3, -0.35, 0.95, 0.4), line=dark, width=0.17)
    pen.shape("rounded_rectangle", (-0.75, -0.6, 0.55, 0.8), color, dark, radius=pen.radius * 0.25)
    pen.shape("ellipse", (-0.75, -0.76, 0.55, -0.4), light, dark)
    pen.shape("ellipse", (-0.6, -0.68, 0.4, -0.46), WOOD)


def draw_bottle(pen, color, dark, light):
    pen.shape("rectangle", (-0.16, -0.95, 0.16, -0.3), color, dark)
    pen.shape("rectangle", (-0.22, -1.0, 0.22, -0.78), INK)
    pen.shape("rounded_rectangle", (-0.45, -0.4, 0.45, 0.95), color, dark, radius=pen.radius * 0.22)
    pen.shape("rectangle", (-0.43, 0.08, 0.43, 0.58), PAPER)


def draw_chair(pen, color, dark, light):
    for x in (-0.55, 0.45):
        pen.shape("rectangle", (x, 0.3, x + 0.14, 0.98), dark)
    pen.shape("rounded_rectangle", (-0.6, -0.95, 0.64, 0.2), color, dark, radius=pen.radius * 0.12)
    for x in (-0.38, -0.08, 0.22):
        pen.shape("rectangle", (x, -0.72, x + 0.17, 0.1), PAPER)
    pen.shape("rounded_rectangle", (-0.72, 0.14, 0.76, 0.42), light, dark, radius=pen.radius * 0.1)


def draw_book(pen, color, dark, light):
    pen.shape("polygon", (-0.62, 0.62, -0.42, 0.9, 0.86, 0.9, 0.66, 0.62), PAPER, dark)
    pen.shape("polygon", (0.66, -0.84, 0.86, -0.56, 0.86, 0.9, 0.66, 0.62), PAPER, dark)
    pen.shape("rectangle", (-0.7, -0.84, 0.66, 0.64), color, dark)
    pen.shape("rectangle", (-0.7, -0.84, -0.46, 0.64), dark)
    pen.shape("rectangle", (-0.26, -0.54, 0.46, -0.14), PAPER)


def draw_kite(pen, color, dark, light):
    pen.shape("line", (0, 0.55, 0.22, 0.7, -0.1, 0.84, 0.24, 1.0), line=INK, width=0.07)
    pen.shape("polygon", (0, -1.0, 0.62, -0.28, 0, 0.6, -0.62, -0.28), color, dark)
    pen.shape("polygon", (0, -1.0, 0.62, -0.28, 0, -0.28), light)
    pen.shape("polygon", (0, 0.6, -0.62, -0.28, 0, -0.28), light)


def draw_bird(pen, color, dark, light):
    pen.shape("line", (-0.1, 0.5, -0.1, 0.92, 0.1, 0.92), line=INK)
    pen.shape("line", (0.16, 0.5, 0.16, 0.92, 0.36, 0.92), line=INK)
    pen.shape("polygon", (-0.95, -0.3, -0.4, 0.0, -0.45, 0.4), dark)
    pen.shape("ellipse", (-0.65, -0.25, 0.55, 0.65), color, dark)
    pen.shape("polygon", (0.78, -0.52, 1.0, -0.38, 0.76, -0.26), WOOD)
    pen.shape("ellipse", (0.12, -0.75, 0.84, -0.05), color, dark)
    pen.shape("ellipse", (0.5, -0.56, 0.66, -0.4), INK)
    pen.shape("pieslice", (-0.5, -0.4, 0.3, 0.45), light, dark, start=0, end=180)


def draw_apple(pen, color, dark, light):
    pen.shape("ellipse", (-0.85, -0.5, 0.2, 0.8), dark)
    pen.shape("ellipse", (-0.2, -0.5, 0.85, 0.8), dark)
    pen.shape("ellipse", (-0.79, -0.44, 0.2, 0.74), color)
    pen.shape("ellipse", (-0.2, -0.44, 0.79, 0.74), color)
    pen.shape("ellipse", (-0.6, -0.25, -0.35, 0.1), light)
    pen.shape("line", (0, -0.35, 0.1, -0.9), line=WOOD, width=0.13)
    pen.shape("ellipse", (0.1, -0.95, 0.65, -0.62), LEAF)


def draw_bowl(pen, color, dark, light):
    pen.shape("rectangle", (-0.35, 0.55, 0.35, 0.78), dark)
    pen.shape("pieslice", (-0.95, -0.95, 0.95, 0.7), color, dark, start=0, end=180)
    pen.shape("ellipse", (-0.95, -0.34, 0.95, 0.12), light, dark)
    pen.shape("ellipse", (-0.76, -0.24, 0.76, 0.03), PAPER)


def draw_umbrella(pen, color, dark, light):
    pen.shape("line", (0, -0.2, 0, 0.75), line=INK, width=0.1)
    pen.shape("arc", (0, 0.5, 0.42, 0.98), line=INK, width=0.1, start=0, end=180)
    pen.shape("pieslice", (-0.98, -0.92, 0.98, 0.9), color, dark, start=180, end=360)
    pen.shape("pieslice", (-0.36, -0.92, 0.36, 0.9), light, start=180, end=360)
    pen.shape("line", (0, -1.0, 0, -0.88), line=INK, width=0.1)


def draw_car(pen, color, dark, light):
    pen.shape("polygon", (-0.6, -0.08, -0.36, -0.58, 0.3, -0.58, 0.62, -0.08), color, dark)
    pen.shape("polygon", (-0.44, -0.08, -0.28, -0.44, -0.06, -0.44, -0.06, -0.08), PAPER)
    pen.shape("polygon", (0.04, -0.08, 0.04, -0.44, 0.23, -0.44, 0.44, -0.08), PAPER)
    pen.shape(
        "rounded_rectangle", (-0.98, -0.12, 0.98, 0.42), color, dark, radius=pen.radius * 0.18
    )
    for x in (-0.52, 0.54):
        pen.shape("ellipse", (x - 0.26, 0.14, x + 0.26, 0.66), INK)
        pen.shape("ellipse", (x - 0.1, 0.3, x + 0.1, 0.5), PAPER)


def draw_clock(pen, color, dark, light):
    pen.shape("ellipse", (-0.88, -0.88, 0.88, 0.88), color, dark)
    pen.shape("ellipse", (-0.62, -0.62, 0.62, 0.62), PAPER, dark)
    for hour in range(0, 12, 3):
        x, y = math.sin(hour * math.pi / 6), math.cos(hour * math.pi / 6)
        pen.shape("line", (0.46 * x, 0.46 * y, 0.58 * x, 0.58 * y), line=INK)
    pen.shape("line", (0, -0.44, 0, 0, 0.3, 0.18), line=INK, width=0.11)


def draw_vase(pen, color, dark, light):
    for x, y in ((-0.42, -0.72), (0.0, -0.88), (0.42, -0.72)):
        pen.shape("line", (x, y, 0, 0), line=LEAF, width=0.09)
        pen.shape("ellipse", (x - 0.17, y - 0.12, x + 0.17, y + 0.2), PAPER, INK, width=0.04)
    pen.shape("ellipse", (-0.55, 0.0, 0.55, 0.95), color, dark)
    pen.shape("polygon", (-0.34, -0.28, 0.34, -0.28, 0.2, 0.2, -0.2, 0.2), color, dark)
    pen.shape("ellipse", (-0.26, 0.2, 0.26, 0.8), color)
    pen.shape("rectangle", (-0.46, 0.42, 0.46, 0.54), light)


DRAWERS = {
    "cup": draw_cup,
    "bottle": draw_bottle,
    "chair": draw_chair,
    "book": draw_book,
    "kite": draw_kite,
    "bird": draw_bird,
    "apple": draw_apple,
    "bowl": draw_bowl,
    "umbrella": draw_umbrella,
    "car": draw_car,
    "clock": draw_clock,
    "vase": draw_vase,
}
CATEGORIES = list(DRAWERS)


def draw(cells, rng):
    """Return an image of SIDE × SIDE pixels.

    `cells` holds (row, column, category, color) of each object. `rng` varies the hand: every
    object is a little larger or smaller, shifted, and tinted.
    """
    big = SIDE * OVERSAMPLING
    wall = tuple(rng.randint(low, high) for low, high in ((228, 248), (226, 244), (214, 240)))
    # The wall grows a little darker from the bottom to the top.
    light_wall = Image.new("RGB", (big, big), wall)
    dark_wall = Image.new("RGB", (big, big), shade(wall, -0.07))
    gradient = Image.linear_gradient("L").resize((big, big))
    image = Image.composite(dark_wall, light_wall, gradient)
    canvas = ImageDraw.Draw(image)
    cell = big / 3
    for row, column, category, color in cells:
        radius = cell * rng.uniform(0.33, 0.40)
        x = cell * (column + 0.5 + rng.uniform(-0.07, 0.07))
        y = cell * (row + 0.5 + rng.uniform(-0.07, 0.07))
        body = tuple(max(0, min(255, value + rng.randint(-12, 12))) for value in COLORS[color])
        pen = Pen(canvas, x, y, radius)
        # A shadow, so that nothing floats.
        pen.shape("ellipse", (-0.8, 0.8, 0.8, 1.08), shade(wall, -0.16))
        DRAWERS[category](pen, body, shade(body, -0.38), shade(body, 0.38))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
