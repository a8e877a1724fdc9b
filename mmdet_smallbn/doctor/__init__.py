"""Norm doctor: measures whether a batch is too small for BatchNorm."""
from .advice import Advice, advise, summary_of, verdict_of
from .diagnosis import Diagnosis
from .examination import diagnose
from .measures import Layer
from .task import Task

__all__ = ['Advice', 'Diagnosis', 'Layer', 'Task', 'advise', 'diagnose',
           'summary_of', 'verdict_of']
