"""The report of a run or an experiment, for people: one HTML file, and the same in Markdown."""

from fdkernels.segmentation.report.build import write_report

__all__ = ["write_report"]
