"""Draw the README's diagram of the course: python -m tools.diagrams."""

from tools.notebooks import ROOT
from utils.diagrams import course

COURSE = ROOT / "docs" / "course.png"

if __name__ == "__main__":
    course().savefig(COURSE)
    print(COURSE.relative_to(ROOT))
