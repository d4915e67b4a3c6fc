"""Settings of Sphinx. `make docs` builds the site in docs/_build/html."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for site_pages

project = "trainer"
html_title = "trainer"
smartquotes = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_pages"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

# Anchors of headings are those of code hosts. A link to a missing page or anchor is a warning.
myst_heading_anchors = 4
# Docstrings mark code as Markdown does, with single backticks.
default_role = "code"
add_module_names = False
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"

linkcheck_timeout = 20
linkcheck_retries = 2
