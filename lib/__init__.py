"""Do a captioner and a generator understand each other? The game, its models and its measures."""
