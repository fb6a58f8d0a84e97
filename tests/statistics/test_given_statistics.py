import pytest
from cases import batches, conv_net

from tp_twoaxis import CalibrationStatistics, LocalImportance, TwoAxisError, prune_to_flops
from tp_twoaxis.statistics.given_statistics import check_statistics


def test_statistics_pass_and_a_path_is_told_how_to_be_read(tmp_path):
    check_statistics(CalibrationStatistics.empty())
    with pytest.raises(TwoAxisError, match=r"got PosixPath; read the file: CalibrationStatistics.load\('.*s'\)"):
        check_statistics(tmp_path / "s")
    with pytest.raises(TwoAxisError, match=r"got dict; calibrate\(model, loader\) gathers them"):
        check_statistics({})


def test_everything_that_takes_statistics_checks_them():
    net, loader = conv_net(), batches()
    with pytest.raises(TwoAxisError, match="stats: expected CalibrationStatistics, got str"):
        LocalImportance("stats.safetensors")
    with pytest.raises(TwoAxisError, match="stats: expected CalibrationStatistics, got str"):
        prune_to_flops(net, loader[0][0][:1], "hull", stats="stats.safetensors", loader=loader, progress=False)
