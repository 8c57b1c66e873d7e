"""The report: every part of the project on one page."""

from ntk_analysis.report.build import Built, build_report
from ntk_analysis.report.settings import ReportSettings

__all__ = ["Built", "ReportSettings", "build_report"]
