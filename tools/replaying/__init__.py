"""The process replay: what torchjac makes of known programs, as text that two revisions share."""
