"""What the pictures of docs/ have in common: colours, boxes and arrows, small files. Draws no picture by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from exitlm.evaluate.plots import BAND, GREY, INK, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "img"
BLUE, GREEN, VIOLET, RED = "#2a8ff4", "#00a878", "#a45ee5", "#d43d51"
PALE = "#c9ced6"


def shrink(path: Path) -> None:
    """Reduce the file to a palette."""
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


@dataclass(frozen=True)
class Drawing:
    """Boxes, arrows and words on a plane whose unit is a tenth of an inch."""

    figure: Figure
    axes: Axes

    @classmethod
    def of(cls, wide: float, high: float) -> Drawing:
        figure = new_figure((wide / 10, high / 10))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, wide), ylim=(0, high))
        axes.axis("off")
        return cls(figure, axes)

    def box(self, x: float, y: float, wide: float, high: float, words: str = "", **looks: Any) -> None:
        """A rectangle with words in its middle; ``ink`` and ``size`` are theirs."""
        from matplotlib.patches import FancyBboxPatch

        ink, size = looks.pop("ink", INK), looks.pop("size", 9)
        looks = {"facecolor": BAND, "edgecolor": GREY, "linewidth": 0.8, **looks}
        style = "round,pad=0,rounding_size=0.8"
        self.axes.add_patch(FancyBboxPatch((x, y), wide, high, boxstyle=style, **looks))
        self.words(x + wide / 2, y + high / 2, words, color=ink, fontsize=size)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str, words: str = "") -> None:
        """An arrow with words above its middle."""
        looks = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", end, start, arrowprops=looks)
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        self.words(middle[0], middle[1] + 1.3, words, color=colour)

    def words(self, x: float, y: float, words: str, **looks: Any) -> None:
        """Words around a point."""
        self.axes.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": 9, "color": INK, **looks})
