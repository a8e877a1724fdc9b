"""The norm doctor: does the batch hurt BatchNorm, and what would help?"""
from .advice import Advice, advise, summary_of, verdict_of
from .examination import Diagnosis, Task, diagnose
from .measures import Layer

__all__ = ['Advice', 'Diagnosis', 'Layer', 'Task', 'advise', 'diagnose',
           'summary_of', 'verdict_of']
