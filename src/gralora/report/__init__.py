"""Reports on an adapter: the norms, ranks and blocks of its update."""

from gralora.report.inspect import LayerReport, Report, inspect

__all__ = ["LayerReport", "Report", "inspect"]
