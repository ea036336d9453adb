"""The machine adapts itself: its own userland, booted once on a controller its initramfs drives, changes what new hardware asks for.

``plan_adaptation`` says what and why; ``fetch_kernel`` gets what is booted; ``adapt`` does it, on overlays, and gives the audit.
"""

from p2v.adapt.audit import Change, FileState, ItemResult, Kind, Status
from p2v.adapt.kernel import GuestKernel, fetch_kernel
from p2v.adapt.plan import ITEMS, AdaptItem, AdaptPlan, plan_adaptation
from p2v.adapt.repair import Repair, repair_of
from p2v.adapt.stage import Adaptation, adapt, find_busybox

__all__ = [
    "ITEMS",
    "AdaptItem",
    "AdaptPlan",
    "Adaptation",
    "Change",
    "FileState",
    "GuestKernel",
    "ItemResult",
    "Kind",
    "Repair",
    "Status",
    "adapt",
    "fetch_kernel",
    "find_busybox",
    "plan_adaptation",
    "repair_of",
]
