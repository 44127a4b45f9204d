"""Leak test for any model and any attention: `audit`."""

from maskops.testing.leak.api import audit
from maskops.testing.leak.arrivals import ARRIVALS
from maskops.testing.leak.layers import LayerLeak
from maskops.testing.leak.outputs import Change
from maskops.testing.leak.report import Alone, AuditReport, BatchAudit, Finding, Leak

__all__ = ["ARRIVALS", "Alone", "AuditReport", "BatchAudit", "Change", "Finding", "LayerLeak", "Leak", "audit"]
