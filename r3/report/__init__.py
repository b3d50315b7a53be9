"""What people look at: the page of a run, of two runs side by side, a figure, and the table of a run that goes on."""

from r3.report.comparison import write_comparison
from r3.report.run_report import write_figure, write_report
from r3.report.table import LiveTable

__all__ = ["LiveTable", "write_comparison", "write_figure", "write_report"]
