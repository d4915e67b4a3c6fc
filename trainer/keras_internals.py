"""All uses of undocumented names of Keras.

An upgrade of Keras can change such a name. Each name is used only in this module, with the reason.
After an upgrade, tests/test_keras_internals.py fails for each use that is broken. This module
imports nothing: the command line needs `DEFERRED_MODULES` before it imports Keras.
"""

# trainer/startup.py imports these on first use: Keras offers no option to leave them out. They
# import scikit-learn, matplotlib and pandas, which take longer to import than the rest of Keras.
DEFERRED_MODULES = (
    "keras.wrappers",
    "keras._tf_keras.keras.wrappers",
    "keras.visualization",
    "keras._tf_keras.keras.visualization",
    "keras.src.visualization",
    "keras.src.trainers.data_adapters.array_slicing",
)

# Keras stores these in every callback. They refer to the training and are not saved.
CALLBACK_ATTRIBUTES = ("_model", "params")
