"""Training of VAE, SiT and refiner."""
