"""Words for what pruning drops: the interface of compensators, and the one of ACCM, a captioner and a selector."""

from vlmprune.compensation.interface import Caption as Caption
from vlmprune.compensation.interface import Compensator as Compensator
from vlmprune.compensation.interface import Discarded as Discarded
from vlmprune.compensation.known import Known as Known
from vlmprune.compensation.remembering import Remembering as Remembering
