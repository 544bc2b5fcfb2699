"""Where sessions are kept: in this process, in a file, or in a Redis that several servers share."""

from serving.stores.base import Entry, Limits, Store, StoreUnavailable, Summary
from serving.stores.choose import open_store

__all__ = ["Entry", "Limits", "Store", "StoreUnavailable", "Summary", "open_store"]
