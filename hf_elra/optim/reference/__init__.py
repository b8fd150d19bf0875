"""The methods in plain float64, to be read beside the papers; tests hold the optimizers against them."""
