"""Settings for a model: at which layer it looks where the question says, and which of many policies answers best at a budget.

``profile_layers`` needs no answers, ``search`` does; ``vlmprune tune`` is both.
"""

from vlmprune.tuning.plots import draw_profile
from vlmprune.tuning.profile import Profile, profile_layers
from vlmprune.tuning.search import Found, search
from vlmprune.tuning.space import default_policies, expand

__all__ = ["Found", "Profile", "default_policies", "draw_profile", "expand", "profile_layers", "search"]
