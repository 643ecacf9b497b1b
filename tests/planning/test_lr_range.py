"""The range test of learning rates, and what a dry run says a training costs."""

import re
from pathlib import Path

import numpy as np
import pytest
from tests.training.test_finetuning import learned

from coatnet import Recipe, UserError
from coatnet.cli.main import main
from coatnet.planning.dry_run import DryRun, dry_run
from coatnet.planning.lr_range import MARGIN, LearningRateRange, falling_range, smoothed
from coatnet.training.config import TrainingConfig
from coatnet.training.trainer import Trainer


def test_the_range_is_where_the_loss_falls() -> None:
    rates = np.geomspace(1e-5, 1.0, 100)
    # Flat at 2.3, down to 0.5 between 1e-4 and 1e-2, flat, and up from 1e-1 on.
    losses = np.interp(np.log10(rates), [-5, -4, -2, -1, 0], [2.3, 2.3, 0.5, 0.5, 9.0])
    found = falling_range(rates.tolist(), losses.tolist())
    assert found is not None
    low, high = (MARGIN * bound for bound in found)
    assert 1e-3 < low < 5e-3 and 3e-2 < high < 2e-1
    assert falling_range(rates.tolist(), [2.3] * 100) is None
    assert falling_range(rates[:5].tolist(), [2.3, 2.0, 1.5, 1.0, 0.5]) is None  # too few


def test_the_mean_of_equal_losses_is_that_loss_from_the_first_on() -> None:
    assert smoothed([2.3] * 20) == pytest.approx([2.3] * 20)


@pytest.mark.parametrize("algorithm", ["adamw", pytest.param("muon", marks=pytest.mark.nightly)])
def test_a_dry_run_tests_learning_rates_and_keeps_nothing(algorithm, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    optimizer = {"algorithm": algorithm}
    recipe = Recipe(data="digits", batch_size=8, epochs=0.1, num_workers=0, optimizer=optimizer)
    result = dry_run(recipe, lr_range=True)
    found = result.learning_rates
    assert found is not None and found.steps > 30
    assert found.chosen == result.config.optimizer.learning_rate
    assert found.chosen * 1e-3 < found.lowest < found.highest < found.chosen * 100
    assert list(tmp_path.iterdir()) == []


def test_the_steps_that_are_timed_are_those_of_the_whole_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = []

    class Watched(Trainer):
        def step(self, *batch):
            loss = super().step(*batch)
            learning.append(all(parameter.requires_grad for parameter in self.model.parameters()))
            return loss

    monkeypatch.setattr("coatnet.planning.dry_run.Trainer", Watched)
    bundle = learned(tuple("0123456789")).save(tmp_path / "bundle")
    recipe = Recipe(data="digits", init=str(bundle), batch_size=8, epochs=0.2, head_first_epochs=0.1, num_workers=0)
    assert "steps only the classifier learns" in dry_run(recipe).description
    assert learning and all(learning)


def test_a_dry_run_says_where_the_chosen_rate_lies_and_what_the_run_costs(digits_config: TrainingConfig) -> None:
    def said(chosen: float = 1e-3, **changes: object) -> str:
        rates = LearningRateRange(chosen=chosen, steps=100, lowest=1e-4, highest=1e-2)
        run = DryRun(digits_config, "digits", 100.0, 10, 20.0, 90.0, 10**9)
        return DryRun(**{**vars(run), "learning_rates": rates, "tested": True, **changes}).describe()

    assert "from 1.0e-04 to 1.0e-02; the chosen 1.0e-03 lies in it" in said()
    assert "lies below" in said(1e-5) and "lies above" in said(1e-1)
    assert "found nothing" in said(learning_rates=None) and "range test" not in said(tested=False)
    assert "That is 3 core-hours on 2 cores, or 0.75 at 0.5 an hour." in said(cores=2, price=0.5)
    assert "That is 1.5 GPU-hours." in said()


@pytest.fixture
def digits_config() -> TrainingConfig:
    from coatnet import open_dataset
    from coatnet.training.defaults import resolve

    return resolve(Recipe(data="digits"), open_dataset("digits"))


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="price must be that of an hour"):
        dry_run(Recipe(data="digits"), price=-1)
    for option in (["--price", "2"], ["--lr_range"]):
        assert main(["train", "--data", "digits", "--out", str(tmp_path / "run"), *option]) == 2
        assert re.fullmatch(r"coatnet.*is for --dry_run.*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
