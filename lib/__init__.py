"""Do a captioner and a generator understand each other? Round trips, their models and measures."""
