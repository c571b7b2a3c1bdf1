"""The wording of every error: where, what was found, what was expected, and the fix.

In: facts. Out: messages. Must not know how the facts were found.
"""

from __future__ import annotations

from collections.abc import Sequence

Problem = tuple[str, str]
"""A leaf's path, and what is wrong with it."""


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _rows(problems: Sequence[Problem]) -> str:
    return "\n".join(f"  {path or '(the weight itself)'}: {what}" for path, what in problems)


def cannot_view(call: str, problems: Sequence[Problem], total: int) -> str:
    """Rules ask for a view that a shape or dtype does not allow."""
    return (
        f"{call}: {len(problems)} of {_count(total, 'weight')} cannot be viewed as asked:\n"
        f"{_rows(problems)}\n"
        "Give these leaves a rule of their own, or None to leave them alone."
    )


def bad_dtype(call: str, problems: Sequence[Problem], total: int) -> str:
    """Weights that are not real floating point numbers."""
    return (
        f"{call}: {len(problems)} of {_count(total, 'weight')} cannot be normalized:\n"
        f"{_rows(problems)}\n"
        "Expected real floating point weights. Cast them, or give these leaves the rule None."
    )


def bad_rules(call: str, problems: Sequence[str]) -> str:
    """The rules themselves are not a sequence of (pattern, operator or None)."""
    return (
        f"{call}: rules are malformed:\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + "\nExpected a sequence of (path pattern, operator or None), such as "
        '(("head/kernel$", None), *jsn.FLAX).'
    )


def unmatched_rules(call: str, patterns: Sequence[str], paths: Sequence[str]) -> str:
    """Patterns given by the caller that match no leaf: a typo, most likely."""
    shown = ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
    return (
        f"{call}: {_count(len(patterns), 'rule matches', 'rules match')} no leaf: "
        f"{', '.join(repr(pattern) for pattern in patterns)}.\n"
        f"The leaves are: {shown or '(none)'}.\n"
        "Patterns are matched with re.search against paths joined by '/'. "
        "Correct the pattern, or remove the rule."
    )


def nothing_tracked(call: str, paths: Sequence[str]) -> str:
    """No leaf at all became a weight."""
    shown = ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
    return (
        f"{call}: no leaf of the parameters is normalized. The leaves are: {shown or '(none)'}.\n"
        "Expected at least one leaf that a rule gives an operator. Add a rule such as "
        '("my_weight$", jsn.Matrix()).'
    )


def other_model(call: str, problems: Sequence[Problem]) -> str:
    """State and parameters do not belong together."""
    return (
        f"{call}: the state does not fit these parameters:\n"
        f"{_rows(problems)}\n"
        "Expected the state that jsn.init made for parameters of this structure and these "
        "shapes. Make a new one with jsn.init(params), or load the matching checkpoint."
    )


def not_a_state(call: str, found: str) -> str:
    """Something that is neither an SNState nor a linen collection of them."""
    return (
        f"{call}: expected the SNState of jsn.init, or the collection variables['sn_state'], "
        f"found {found}.\n"
        "If this comes from a checkpoint, restore it into a target made by jsn.init(params)."
    )


def bad_restore(problems: Sequence[Problem]) -> str:
    """A serialized state that does not fit the SNState it is restored into."""
    return (
        "SNState: the serialized state does not fit the target:\n"
        f"{_rows(problems)}\n"
        "Restore into a state made by jsn.init with the same parameters, rules and block_size."
    )


def cannot_keep_sharding(call: str, problems: Sequence[Problem]) -> str:
    """Weights that would have to be gathered, or whose sharding says nothing by name."""
    return (
        f"{call}: {_count(len(problems), 'weight')} cannot be tracked where it lies:\n"
        f"{_rows(problems)}\n"
        "Expected a jax.sharding.NamedSharding over input, output or batch axes (of a "
        "convolution: over its channels, if they are not grouped); jsn gathers no weight by "
        "itself. Shard these weights otherwise, or give these leaves the rule None."
    )


def bad_u(call: str, found: tuple[int, ...], expected: Sequence[str], shape: tuple) -> str:
    """A `u` whose shape does not fit the weight."""
    return (
        f"{call}: u has shape {found}, but a weight of shape {shape} viewed this way needs "
        f"{' or '.join(expected)}."
        " u lives on the output side, with its vectors as rows: transpose or rebuild it."
    )


def bad_u_dtype(call: str, found: str) -> str:
    """A `u` that is not floating point."""
    return f"{call}: u is {found}, expected an array of real floating point numbers: cast it."


def no_operator(call: str, found: object) -> str:
    """Something other than an operator was given as one."""
    return (
        f"{call}: operator is {found!r}, expected a jsn.Matrix, a jsn.Conv, or None for "
        "jsn.Matrix(). Give an instance: operator=jsn.Matrix(out_axis=0)."
    )


def bad_count(call: str, name: str, found: object, least: int) -> str:
    """A count such as n_steps or block_size that is not an integer in range."""
    return (
        f"{call}: {name} is {found!r}, expected an integer of at least {least}. "
        f"It is static: under jit, pass a Python number."
    )


def bad_bound(call: str, name: str, problems: Sequence[Problem]) -> str:
    """A static bound or scale that cannot be one."""
    return (
        f"{call}: {name} is not usable:\n"
        f"{_rows(problems)}\n"
        f"Expected a real number above 0, a scalar array, or a tree prefix of params of those."
        if name == "bound"
        else f"{call}: {name} is not usable:\n"
        f"{_rows(problems)}\n"
        "Expected a real number, a scalar array, or a tree prefix of params of those."
    )


def bad_prefix(call: str, name: str, detail: str) -> str:
    """A bound or scale tree that is no prefix of the parameters."""
    return (
        f"{call}: {name} is not a tree prefix of params: {detail}\n"
        "Give one value, or a tree with params' own keys, cut off wherever one value serves "
        "the whole subtree."
    )


def bad_axes(found: str) -> str:
    """Axes of Matrix that contradict each other before any shape is known."""
    return (
        f"jsn.Matrix: {found}. "
        "Expected in_axis, out_axis and batch_axis to be integers or sequences of integers, "
        "each axis named once, with at most one of in_axis and out_axis None ('all the rest')."
    )


def no_linen_state(path: str) -> str:
    """A decorated linen module applied without its collection."""
    return (
        f"jsn.linen: {path} was applied without its 'sn_state' collection. "
        "Pass variables that contain it: model.apply({'params': params, 'sn_state': sn_state}, "
        "...). model.init makes it; for parameters trained without jsn, "
        "jsn.linen.init_state(model, variables, *args) does. Inside nn.scan, nn.vmap or nn.RNN, "
        "list 'sn_state' beside 'params' (variable_axes={'params': 0, 'sn_state': 0}), or "
        "decorate the class around them."
    )


def not_linen(found: str) -> str:
    """Something other than a linen module class was decorated."""
    return (
        f"jsn.linen.spectral_norm: expected a flax.linen.Module class, found {found}. "
        "Decorate the class, not an instance: jsn.linen.spectral_norm(nn.Dense)(features=64). "
        "For a tree of parameters use jsn.init and jsn.normalize."
    )


def not_decorated(name: str) -> str:
    """A linen model without a decorated module was asked for its state."""
    return (
        f"jsn.linen.init_state: no module of {name} keeps spectral normalization state. "
        "Expected a model with a decorated class: jsn.linen.spectral_norm(Model)(...). "
        "Inside nn.scan, nn.vmap or nn.RNN, list 'sn_state' beside 'params'."
    )


# --- interop ----------------------------------------------------------------------------------


def not_importable(call: str, what: str, found: str) -> str:
    """What was handed to an importer is not the kind of thing it reads."""
    return f"{call}: expected {what}, found {found}."


def pickled_file(call: str, path: str) -> str:
    """A file that only pickle could read: jsn never does."""
    return (
        f"{call}: {path} is no .safetensors file. Files of torch.save are pickles, which can run "
        "code when they are opened, so jsn does not open them. Load it in torch and hand over "
        "the dict: torch.load(path, weights_only=True); or convert it once with "
        "safetensors.torch.save_file."
    )


def unreadable_file(call: str, path: str, detail: str) -> str:
    """A safetensors file that cannot be read."""
    return (
        f"{call}: {path} cannot be read as safetensors: {detail}.\n"
        "Expected a complete file, as safetensors.torch.save_file writes it. Save or download it "
        "again."
    )


def missing_package(call: str, package: str, what: str) -> str:
    """An optional package is needed and not installed."""
    return f"{call}: {what} needs {package}, which is not installed: pip install {package}."


def bad_entries(call: str, problems: Sequence[Problem], fix: str) -> str:
    """Entries of a foreign checkpoint that cannot be used as what they claim to be."""
    count = _count(len(problems), "entry", "entries")
    return f"{call}: {count} cannot be used:\n{_rows(problems)}\n{fix}"


def nothing_imported(call: str, expected: str, keys: Sequence[str], fix: str) -> str:
    """A checkpoint in which no weight is spectrally normalized."""
    shown = ", ".join(keys[:12]) + (", ..." if len(keys) > 12 else "")
    return (
        f"{call}: nothing here is spectrally normalized. Expected {expected}.\n"
        f"The entries are: {shown or '(none)'}.\n{fix}"
    )


def cannot_export(call: str, library: str, problems: Sequence[Problem]) -> str:
    """Weights whose normalization another library has no way to express."""
    return (
        f"{call}: {_count(len(problems), 'weight')} cannot be expressed in {library}:\n"
        f"{_rows(problems)}\n"
        "Leave with plain weights instead, which need no spectral normalization any more: "
        "jsn.fold(params, state)."
    )


# --- convolutions and reading models ----------------------------------------------------------


def bad_conv(found: str) -> str:
    """An argument of Conv that contradicts the others before any kernel is known."""
    return (
        f"jsn.Conv: {found} cannot be used. "
        "Expected input_shape to be 1 to 3 spatial sizes and then channels, such as (32, 32, 3); "
        "strides and kernel_dilation a number from 1 on, or one for each spatial axis; padding "
        "what the layer takes: 'SAME', 'VALID', 'CIRCULAR', and for flax.linen.Conv also "
        "'SAME_LOWER', 'REFLECT' and (with one spatial axis) 'CAUSAL', a number, or a number or "
        "(low, high) for each spatial axis."
    )


def not_nnx(found: str) -> str:
    """Something other than an nnx module was wrapped."""
    return (
        f"jsn.nnx.spectral_norm: expected a flax.nnx.Module, found {found}. "
        "Wrap an instance: jsn.nnx.spectral_norm(nnx.Linear(8, 4, rngs=rngs)). "
        "For a linen class use jsn.linen.spectral_norm, for a tree of parameters jsn.init."
    )


def nnx_wrapped_twice() -> str:
    """A wrapper was wrapped."""
    return (
        "jsn.nnx.spectral_norm: the module is wrapped already. Expected a plain module: set the "
        "wrapper's own attributes (bound, soft, n_steps), or wrap wrapper.module."
    )


def no_nnx_wrapper(call: str, found: str) -> str:
    """A module without a wrapper was to be normalized or folded."""
    return (
        f"{call}: found no wrapper in this {found}. Expected what jsn.nnx.spectral_norm returned, "
        "or a module that contains it."
    )


def nnx_other_trace() -> str:
    """A note on the error that nnx raises where a Variable of an outer trace is written."""
    return (
        "jsn.nnx: in training mode a wrapper stores its next state, which it cannot do from "
        "inside another trace than its own. Pass the module as an argument through nnx.jit, "
        "nnx.grad, nnx.vmap, ... instead of closing over it, or call .eval() on it first."
    )


# --- certificates and audit -------------------------------------------------------------------


def bad_logits(found: str) -> str:
    """Logits that cannot be compared."""
    return (
        f"jsn.certified_radius: logits have {found}. "
        "Expected real numbers of shape (..., classes), with at least two classes."
    )


def bad_lipschitz(found: str) -> str:
    """A Lipschitz bound that cannot be one."""
    return (
        f"jsn.certified_radius: bound is {found}. Expected numbers of at least 0, such as "
        "jsn.lipschitz_bound returns: one, or one for each example."
    )


def bad_labels(found: str, expected: str) -> str:
    """Labels that do not go with the logits."""
    return f"jsn.certified_accuracy: labels have {found}, expected {expected}."


def bad_radii(found: str) -> str:
    """Radii that are none."""
    return f"jsn.certified_accuracy: radii are {found}, expected numbers of at least 0."


def missing_extra(call: str, package: str, what: str) -> str:
    """A package of an extra is needed and not installed."""
    return (
        f"{call}: {what} needs {package}, which is not installed: pip install {package}, or "
        "everything that audits can use: pip install 'jsn[audit]'."
    )


def pickled_checkpoint() -> str:
    """A file that only pickle could read: jsn never does."""
    return (
        "is a pickle, which can run code when it is opened, so jsn does not open it: convert it "
        "to safetensors with safetensors.torch.save_file(torch.load(path, weights_only=True), ...)"
    )


def unknown_checkpoint() -> str:
    """A file of no known format."""
    return (
        "is in no format that jsn reads: expected .safetensors, .npz, Flax's .msgpack, or the "
        "directory of an Orbax checkpoint"
    )


def bad_view(text: str, found: str) -> str:
    """A rule of the command line that says nothing."""
    return (
        f"--rules {text!r}: {found}. Expected PATTERN=VIEW with VIEW one of none, flax, torch, "
        "AXES such as in:0,out:1+2,batch:-, or conv:32x32x3,strides:2,padding:SAME"
    )


# --- bounds -----------------------------------------------------------------------------------


def bad_arithmetic(what: str) -> str:
    """A processor mode under which nothing is proven."""
    return (
        f"jsn.upper_bound: on this thread, {what}, so no bound can be proven. "
        "Expected the IEEE default. A library built with -ffast-math sets that mode when it is "
        "loaded: find it by importing fewer libraries, or run this in a process of its own."
    )


def too_long(n: int, unit: float) -> str:
    """More roundings than an error bound can cover."""
    return (
        f"jsn.upper_bound: an inner product of {n} terms with unit roundoff {unit:.1g} has no "
        'error bound. Use method="cholesky", which computes in float64.'
    )


def not_finite(call: str, wrong: int, total: int, first: tuple, value: str) -> str:
    """A weight with NaN or infinite entries has no bound."""
    return (
        f"{call}: {wrong} of {_count(total, 'entry', 'entries')} not finite; the first, "
        f"at {first}, is {value}. Expected finite numbers: repair the weight, or restore an "
        "earlier checkpoint."
    )


def not_addressable(call: str) -> str:
    """A weight of which this process holds a part only."""
    return (
        f"{call}: this process can read only a part of the weight, whose shards lie on devices of "
        "other processes. Gather it first (jax.experimental.multihost_utils.process_allgather), "
        'or use method="gram" inside jit.'
    )


def no_bound_for(call: str, operator: str) -> str:
    """An operator of a kind that no proof is known for."""
    return (
        f"{call}: no bound is known for the operator {operator}. Expected jsn.Matrix or jsn.Conv."
    )


def bad_method(call: str, method: str, operator: str, known: Sequence[str]) -> str:
    """A method that does not exist for this operator."""
    return (
        f"{call}: method is {method!r}, operator {operator}. "
        f"Expected one of {', '.join(map(repr, known))}."
    )


def traced_bound(call: str, method: str) -> str:
    """A proof that runs on the host was asked for under a JAX transformation."""
    return (
        f"{call}: W is traced (jit, grad, vmap or scan) and method {method!r} runs on the host. "
        'Call it outside the transformation, or use method="gram".'
    )


def too_wide(call: str, dtype: str) -> str:
    """A dtype with more digits than the proofs compute with."""
    return (
        f"{call}: dtype {dtype} has more digits than bounds are proven in. Expected float64 or "
        "less: cast the weight, and the bound is that of the cast one."
    )


def gram_on_tpu() -> str:
    """A device whose products have no error bound of the classical kind."""
    return (
        'jsn.upper_bound: method="gram" is not proven on a TPU, whose float32 products are sums '
        'of bfloat16 ones. Use method="cholesky", or run it on the CPU: '
        'jax.default_device(jax.devices("cpu")[0]).'
    )


def not_exact(reports: Sequence[tuple[str, str, bool]]) -> str:
    """Weights of a linen model whose exact operator is unknown, or was chosen."""
    alone = [(path, what) for path, what, is_alone in reports if is_alone]
    chosen = [(path, what) for path, what, is_alone in reports if not is_alone]
    parts = []
    if alone:
        parts.append(
            f"{_count(len(alone), 'weight')} could not be read exactly, and "
            f"{'is' if len(alone) == 1 else 'are'} left alone:\n{_rows(alone)}"
        )
    if chosen:
        parts.append(f"{_count(len(chosen), 'weight')} left a choice:\n{_rows(chosen)}")
    return (
        "jsn.linen.operators: " + "\n".join(parts) + "\nGive these weights rules of their own, "
        "or None to leave them alone without this warning: "
        'jsn.linen.operators(model, x, rules=[("^path/of/weight$", jsn.Matrix())]).'
    )


def not_a_model(call: str, found: str) -> str:
    """Something other than a linen module was to be read."""
    return (
        f"{call}: expected an instance of a flax.linen.Module, found {found}. "
        "Pass the model and what model.init takes: jsn.linen.operators(Model(), x)."
    )


def unknown_rules(found: str) -> str:
    """A word given as rules."""
    return (
        f'jsn.linen.spectral_norm: rules={found!r} is unknown. Expected "operators", or a '
        "sequence of (path pattern, operator or None), such as jsn.FLAX."
    )


def no_params(call: str) -> str:
    """An optax transformation that needs the parameters was not given them."""
    return (
        f"{call}: needs the parameters that the update is for. "
        "Call tx.update(updates, state, params)."
    )


def no_cap(call: str, bound: float, max_update: float, largest: float) -> str:
    """Numbers for which the polynomials of the soft cap are no cap."""
    return (
        f"{call}: for bound={bound:g}, an update of norm max_update={max_update:g} is too large "
        f"for the soft cap to undo: expected at most {largest:.4g} (a k^2 <= 1/3). "
        "Lower the learning rate, raise the bound, or use jsn.optim.hard_cap."
    )


def cap_needs_matrix(call: str, problems: Sequence[Problem]) -> str:
    """Weights whose singular values cannot be limited one by one within their own layout."""
    return (
        f"{call}: {_count(len(problems), 'weight is', 'weights are')} not seen as a matrix:\n"
        f"{_rows(problems)}\n"
        "Give these leaves a rule with jsn.Matrix or None, or use "
        "jsn.optim.keep_spectral_norm_below."
    )


def not_moved(call: str, found: str) -> str:
    """An input of `lipschitz_bound` is not made of real floating point arrays."""
    return (
        f"{call}: x is made of {found}.\n"
        "A Lipschitz constant says how far outputs move when inputs do: pass floating point "
        "arrays, and close over everything else: lambda x: fn(x, labels)."
    )


def bound_overflows(call: str) -> str:
    """A Lipschitz constant exceeds every float."""
    return f"{call}: the bound is larger than any float64. Normalize the weights of this function."


def no_constant(
    call: str, primitive: str, shapes: str, source: str, layer: str, reason: str
) -> str:
    """No finite Lipschitz constant is known for a primitive."""
    where = f"{source}, in {layer}" if layer else source
    return (
        f"{call}: no finite Lipschitz constant is known, because of `{primitive}` of {shapes}\n"
        f"  at {where}:\n"
        f"  it {reason}.\n"
        "Bound its operands (jnp.clip, jnp.tanh, a floor under a square root or a division), or "
        "leave it out of the function."
    )
