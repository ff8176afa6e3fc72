"""Adapters on a model: which layers get one, how it is made, put on, made to count, merged and taken off again.

An adapter goes on in steps, so that a call that fails leaves the model bit for bit as it was:

* **resolve** (:func:`lorafa.surgery.resolve.resolve`) lets a config meet a model, once: it checks the config, finds the
  layers, and settles what depends on the model. Later steps trust it.
* **plan** (:func:`lorafa.surgery.plan.plan`) checks all else that can be wrong, and makes every tensor of the adapter.
  It changes nothing.
* **apply** (:func:`lorafa.surgery.apply.apply`) changes the model: it wraps the layers, attaches what was made, and
  freezes the rest. The adapter does not count yet; :func:`lorafa.surgery.activate.set_adapter` lets it.
* **undo** is what apply returns: calling it takes the plan back, ``requires_grad`` included. apply calls it by itself
  where something fails halfway, and loading does where a file turns out not to fit.

:class:`lorafa.surgery.lora_model.LoraModel` holds the configs and runs these steps; the other files are what can be
done with adapters once they are on.
"""
