"""The report page of a run and its pictures."""

from vmd_scale.report.figures import plot_bound_against_steps
from vmd_scale.report.page import write_report
from vmd_scale.report.run import read_run

__all__ = ["plot_bound_against_steps", "read_run", "write_report"]
