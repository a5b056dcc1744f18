"""What everything stands on: errors, files, hashes, JSON, hardware. Needs nothing of this package."""
