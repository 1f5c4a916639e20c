"""Cost against visual tokens, batch and images: a decoder, its measurement, exponents and plots."""
