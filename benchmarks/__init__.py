"""This project beside its neighbours, on the same work in one run: read the ratios, not the seconds."""
