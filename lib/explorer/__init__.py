"""The explorer: plain functions for one source at a time (``session``), and a page of widgets on top of them."""

from lib.explorer.page import open_page as open_page
