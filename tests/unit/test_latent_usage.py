"""What is said about the use of the latent, against an encoder whose answers are known."""

import numpy as np
import pytest
import torch
from tiny_models import architecture
from torch import nn

from vmd_scale.config import DataConfig
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader
from vmd_scale.evaluation.latent import MASK_RATIOS, latent_usage
from vmd_scale.model.encoder import Gaussian, Posterior

LENGTH = 20


class KnownEncoder(nn.Module):
    """Units that vary with the row much, not at all, too little and enough; the second says how much is masked.

    So in each group; in the second one, the second unit is 10 higher: that is no use of the latent. With a `prior`, the
    same in its units: its mean is -3 or 3, with the row, its standard deviation `prior`.
    """

    def __init__(self, groups=1, prior=None):
        super().__init__()
        self.architecture = architecture(row_length=LENGTH, latent_width=4, groups=groups)
        self.weight, self.prior = nn.Parameter(torch.zeros(())), prior

    def encode(self, tokens, masked, attend):
        groups = self.architecture.groups
        sign = 1 - 2 * (tokens.unflatten(1, (groups, -1)).sum(-1) % 2).float()
        share = masked.float().unflatten(1, (groups, -1)).mean(-1)
        mean = torch.stack((sign, 2 * share, 0.05 * sign, 0.2 * sign), -1)
        mean[:, 1:, 1] += 10
        if self.prior is None:
            return Posterior(mean, torch.zeros_like(mean))
        prior = Gaussian(3 * sign[..., None].expand_as(mean), torch.full_like(mean, self.prior).log())
        return Posterior(prior.mean + self.prior * mean, prior.log_std, prior)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    letters = np.random.default_rng(0).integers(97, 123, 400 * LENGTH).astype(np.uint8)
    (folder / "text.txt").write_bytes(letters.tobytes())
    config = DataConfig(
        corpus="text",
        source=str(folder / "text.txt"),
        tokenizer="text8",
        row_length=LENGTH,
        shards=str(folder / "shards"),
    )
    prepare(config, ["train"], progress=False)
    return ShardReader(config.shards, "train")


def test_kl_at_every_mask_ratio_and_the_units_that_vary_over_the_rows(reader):
    usage = latent_usage(KnownEncoder(), reader, 7, "vmd", rows=100, micro_batch=32)
    expected = {str(ratio): 0.5 * (2 * ratio) ** 2 + 0.5 * (1 + 0.05**2 + 0.2**2) for ratio in MASK_RATIOS}
    assert usage.kl_by_mask_ratio == pytest.approx(expected)
    assert (usage.active_units, usage.latent_width, usage.rows, usage.step) == (2, 4, 100, 7)
    assert "2 of 4 units active" in usage.describe()
    for histogram in usage.kl_histograms.values():
        assert sum(histogram["counts"]) == 100


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_an_encoder_that_diverged_does_not_end_the_run(reader, broken):
    """A histogram has no place for what is not finite: it is counted beside it, and the mean says so too."""

    class Diverged(KnownEncoder):
        def encode(self, tokens, masked, attend):
            q = super().encode(tokens, masked, attend)
            return Posterior(q.mean.where(q.mean[..., :1] > 0, broken), q.log_std)

    usage = latent_usage(Diverged(), reader, 7, "vmd", rows=100)
    for ratio, histogram in usage.kl_histograms.items():
        assert 0 < usage.kl_not_finite[ratio] < 100
        assert sum(histogram["counts"]) + usage.kl_not_finite[ratio] == 100
        assert not np.isfinite(usage.kl_by_mask_ratio[ratio])
    nothing = latent_usage(KnownEncoder(prior=0.0), reader, 7, "nelbo", rows=100)  # 0 / 0 everywhere
    assert nothing.kl_not_finite == {"1.0": 100}
    assert sum(nothing.kl_histograms["1.0"]["counts"]) == 0


@pytest.mark.parametrize(("groups", "prior"), [(1, 0.5), (1, 20.0), (2, None), (2, 0.5)])
def test_units_are_measured_in_those_of_their_prior_and_in_each_group_by_itself(reader, groups, prior):
    """What the prior says of a row is no use of the latent, nor is a mean that tells only which group it is."""
    usage = latent_usage(KnownEncoder(groups, prior), reader, 7, "vmd", rows=100, micro_batch=32)
    for ratio in MASK_RATIOS:
        share = np.ceil(ratio * LENGTH / groups) / (LENGTH / groups)
        kls = [0.5 * ((shift + 2 * share) ** 2 + 1 + 0.05**2 + 0.2**2) for shift in (0, 10)[:groups]]
        assert usage.kl_by_mask_ratio[str(ratio)] == pytest.approx(np.mean(kls), rel=1e-4)
    assert (usage.active_units, usage.latent_width) == (2, 4)
    for histogram in usage.kl_histograms.values():
        assert sum(histogram["counts"]) == 100 * groups


def test_an_encoder_that_was_taught_whole_rows_only_is_asked_about_them_only(reader):
    usage = latent_usage(KnownEncoder(), reader, 0, "nelbo", rows=100)
    assert list(usage.kl_by_mask_ratio) == ["1.0"]
    assert usage.active_units == 2
