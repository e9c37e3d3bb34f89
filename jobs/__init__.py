"""The scripts that a user runs; what is behind them lies in the folders beside them."""
