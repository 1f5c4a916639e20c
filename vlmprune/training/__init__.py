"""Training of what can be learned: the captioner and the selector of ACCM."""

from vlmprune.training.plan import Plan as Plan
from vlmprune.training.run import Trained as Trained
from vlmprune.training.run import spell as spell
from vlmprune.training.run import train as train
from vlmprune.training.start import Start as Start
