"""The algorithm of TAP: components, replacement, distillation, aggregation, local training. Imports torch only."""
