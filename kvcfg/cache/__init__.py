"""The paged cache: bytes (storage), integers (ledger) and the class that joins them (paged)."""
