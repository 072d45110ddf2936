"""Published figures and tables, recomputed: ``hesskern reproduce``."""
