"""Tools around the library, which the library itself never imports."""
