"""The laboratory: machines of model guests, scenarios, sweeps and the paper table."""
