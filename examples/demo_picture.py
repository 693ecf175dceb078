"""The picture of the demo: where the arm reaches and how freely it moves there; the timings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl

import arm

mpl.use("Agg")  # a file, no window: the demo also runs where there is no display
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Ellipse, Rectangle
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from demo import Timing

INK, PAPER, OURS, THEIRS = "#1f2430", "#fbfaf7", "#e4572e", "#9aa3b2"
SECONDS_SHOWN = 0.12  # the ellipses show where the hand can be after this time at unit joint speed


def draw(q: Tensor, pose: Tensor, J: Tensor, timings: Sequence[Timing], out: str) -> None:
    """Writes the picture to the file `out`."""
    plt.rcParams.update(
        {"font.size": 10.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}
    )
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 6.8), width_ratios=(0.92, 1), facecolor=PAPER, layout="constrained"
    )
    draw_reach(left, q, pose, J)
    draw_timings(right, timings, len(q))
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.12)
    figure.savefig(out, dpi=140, facecolor=PAPER)
    plt.close(figure)


def side_view(points: Tensor, heading: Tensor) -> tuple[list[float], list[float]]:
    """Points seen from the side, with the direction `heading` (in the floor) to the right."""
    return (points[..., :2] @ heading).tolist(), points[..., 2].tolist()


def draw_reach(axes: Axes, q: Tensor, pose: Tensor, J: Tensor) -> None:
    """Reached points in the half plane (distance from the base axis, height), and three poses."""
    measure = arm.manipulability(pose, J)
    order = measure.argsort()  # good poses on top
    radius, height = pose[:, :2].norm(dim=-1), pose[:, 2]
    dots = axes.scatter(
        radius[order], height[order], c=measure[order], s=12, cmap="viridis", lw=0, alpha=0.75
    )
    axes.axhline(0, color=INK, lw=1)
    axes.add_patch(Rectangle((-0.09, -0.04), 0.18, 0.04, color=INK))
    for name, index in distinct_poses(measure, radius, height).items():
        draw_arm(axes, q[index], pose[index], J[index])
        axes.annotate(
            f"{name}: {measure[index]:.3f}",
            (radius[index].item(), height[index].item()),
            (0.62, 1.12) if name == "most dexterous" else (0.8, -0.38),
            ha="center",
            arrowprops={"arrowstyle": "-", "color": INK, "lw": 1, "shrinkB": 6},
            zorder=9,
        )
    bar = axes.figure.colorbar(dots, ax=axes, shrink=0.75, pad=0.02)
    bar.set_label("manipulability √det(JJᵀ)")
    bar.outline.set_visible(False)
    axes.set(
        xlabel="distance from the base axis [m]",
        ylabel="height [m]",
        xlim=(-0.33, 1.0),
        ylim=(-0.45, 1.25),
        aspect="equal",
        facecolor=PAPER,
    )
    axes.set_title(
        f"Reach of a seven-joint arm: {len(q)} poses\n",
        loc="left",
        fontweight="bold",
    )
    axes.text(
        0,
        1.015,
        "ellipses: how fast the hand can go, by direction, at unit joint speed",
        transform=axes.transAxes,
        fontsize=9.5,
    )
    axes.spines[["top", "right"]].set_visible(False)


def distinct_poses(measure: Tensor, radius: Tensor, height: Tensor) -> dict[str, int]:
    """The most dexterous pose, and the most stretched one: nearly singular, its ellipse is flat."""
    reach = radius**2 + (height - arm.LINKS[0][2]) ** 2
    stretched = torch.where((height > 0.0) & (height < 0.6), reach, -1.0).argmax()
    return {"stretched out": int(stretched), "most dexterous": int(measure.argmax())}


def draw_arm(axes: Axes, q: Tensor, pose: Tensor, J: Tensor) -> None:
    """The links of one pose from the side, and the velocity ellipse of its hand."""
    heading = pose[:2] / pose[:2].norm()
    origins = torch.stack(arm.chain(q)[0])
    x, z = side_view(origins, heading)
    axes.plot(x, z, color=PAPER, lw=9, solid_capstyle="round", solid_joinstyle="round", zorder=4)
    axes.plot(x, z, color=INK, lw=5.5, solid_capstyle="round", solid_joinstyle="round", zorder=5)
    axes.plot(x[1:-1], z[1:-1], "o", ms=6.5, mfc=PAPER, mec=INK, mew=1.8, zorder=6)
    plane = torch.stack([torch.cat([heading, heading.new_zeros(1)]), heading.new_tensor([0, 0, 1])])
    directions, speeds, _ = torch.linalg.svd(plane @ J[:3])
    angle = torch.atan2(directions[1, 0], directions[0, 0]).rad2deg().item()
    width, depth = (2 * SECONDS_SHOWN * speeds).tolist()
    for edge, lw in ((PAPER, 4.5), (OURS, 2.2)):
        axes.add_patch(
            Ellipse((x[-1], z[-1]), width, depth, angle=angle, fill=False, ec=edge, lw=lw, zorder=7)
        )
    axes.plot(x[-1], z[-1], "o", ms=6, color=OURS, mec=PAPER, mew=1, zorder=8)


def draw_timings(axes: Axes, timings: Sequence[Timing], poses: int) -> None:
    """Bars on a logarithmic scale, fastest at the top."""
    timings = sorted(timings, key=lambda t: -t.seconds)
    ours = next(t.seconds for t in timings if t.name.startswith("torchjac"))
    values = [t.seconds * 1e3 for t in timings]
    colors = [OURS if t.name.startswith("torchjac") else THEIRS for t in timings]
    axes.barh(range(len(timings)), values, color=colors, height=0.62)
    for k, timing in enumerate(timings):
        ratio = timing.seconds / ours
        shown = "" if ratio == 1 else f"  ({ratio:,.{0 if ratio >= 10 else 1}f}×)"
        axes.text(values[k] * 1.08, k, f"{format_ms(values[k])}{shown}", va="center", fontsize=10)
        bold = "bold" if ratio == 1 else "normal"
        remark = f"   {timing.remark}" if timing.remark else ""
        axes.text(
            min(values) * 0.34,
            k + 0.4,
            timing.name + remark,
            va="center",
            fontsize=9.5,
            fontweight=bold,
        )
    axes.set_xscale("log")
    axes.set_xlim(min(values) * 0.33, max(values) * 9)
    axes.set_ylim(-0.5, len(timings) - 0.25)
    axes.set_yticks([])
    axes.set_xlabel("milliseconds for all poses, median (logarithmic)")
    axes.set_title(f"Jacobian of {poses} × (7 → 12), float64\n", loc="left", fontweight="bold")
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right", "left"]].set_visible(False)


def format_ms(value: float) -> str:
    """Three digits are enough to compare."""
    return f"{value:,.{0 if value >= 100 else 1}f} ms"
