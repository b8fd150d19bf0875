"""The methods in plain float64, to be read beside the papers; tests compare the optimizers with them."""
