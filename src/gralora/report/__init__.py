"""What an adapter does to its model: norms, ranks, blocks."""

from gralora.report.inspect import LayerReport, Report, inspect

__all__ = ["LayerReport", "Report", "inspect"]
