"""One module per system: its paper's headline, measured here. `base` says what a claim is and runs it."""
