"""Writing a trained drafter for other decoders: one file per consumer, each export reloaded and compared first."""
