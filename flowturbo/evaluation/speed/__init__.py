"""The benchmark: what a picture takes on this machine, stage by stage, and how sure that is. Needs no torch."""
