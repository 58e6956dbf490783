"""The CPU kernel's C sources, and the library that ``build`` makes of them."""
