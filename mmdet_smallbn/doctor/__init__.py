"""The norm doctor: does the batch hurt BatchNorm, and what would help?"""
from .advice import Advice, advise, summary_of, verdict_of
from .diagnosis import Diagnosis
from .examination import diagnose
from .measures import Layer
from .task import Task

__all__ = ['Advice', 'Diagnosis', 'Layer', 'Task', 'advise', 'diagnose',
           'summary_of', 'verdict_of']
