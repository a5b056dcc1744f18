"""An engine directory: the contract of its graphs and its manifest."""
