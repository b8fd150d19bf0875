"""The paper's two-dimensional problems: counts at or below the paper's, paths that turn with the coordinates."""

import statistics

import pytest
import torch

from lib.problems_2d import PROBLEMS, optimizers, walk


@pytest.mark.parametrize("name", ["ELRA", "ELRA, bb2"])
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if "121" not in p.name], ids=lambda p: p.name)
def test_elra_needs_no_more_updates_than_in_the_paper_and_turns_with_the_coordinates(problem, name):
    make = optimizers(problem)[name]
    straight, turned = walk(problem, make, limit=500), walk(problem, make, degrees=45, limit=500)
    assert len(straight) - 1 <= problem.paper["ELRA"]
    assert len(turned) == len(straight)
    assert straight[0] == pytest.approx(problem.start)
    for one, other in zip(straight[:5], turned[:5], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-9)


def test_adam_does_not_turn_with_the_coordinates():
    problem = PROBLEMS[0]
    make = optimizers(problem)["Adam"]
    assert len(walk(problem, make)) != len(walk(problem, make, degrees=45))


def test_a_walk_gives_up_at_its_limit():
    assert len(walk(PROBLEMS[1], optimizers(PROBLEMS[1])["RMSprop"], limit=30)) == 31


@pytest.mark.parametrize("name", ["ELRA", "ELRA, bb2"])
def test_far_rosenbrock_median_over_perturbed_starts(name):
    problem = next(p for p in PROBLEMS if "121" in p.name)
    generator = torch.Generator().manual_seed(0)
    shifts = (1e-3 * torch.randn(31, 2, generator=generator, dtype=torch.float64)).tolist()
    limit = problem.paper["ELRA"] + 1  # how much longer a walk is does not move the median across the limit
    counts = [len(walk(problem, optimizers(problem)[name], shift=tuple(shift), limit=limit)) - 1 for shift in shifts]
    assert statistics.median(counts) <= problem.paper["ELRA"]
