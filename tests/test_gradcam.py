"""What `skin_gradcam.gradcam` and its `engine` promise: right maps under every mode of PyTorch, nothing left behind.

What can be known about a map, and which tests hold it to that (P: in test_gradcam_peers.py, M: test_methods.py,
D: test_display.py, the rest here; a test in M looks whether they exist):

 1 captum's raw map: P gradcam_equals_captum
 2 torchcam's and pytorch-grad-cam's: P gradcam_equals_torchcam_and_pgc_where_nothing_works_in_place
 3 HiResCAM of captum and pytorch-grad-cam: P hirescam_equals_captum_and_pgc
 4 pooling and a linear layer make all three one: P pooling_and_a_linear_layer_make_them_one, layers_of_timm,
   pooling_and_any_head_makes_gradcam_hirescam
 5 maps and bias sum to the logit: methods_give_the_known_maps, piecewise_linear_head_without_bias_is_complete
 6 flatten and linear, worked out: flatten_and_linear
 7 closed forms of the family: M closed_forms_behind_pooling_and_a_linear_layer, M layercam_covers_hirescam
 8 linear in the target, counterfactual: targets_agree_with_each_other, M maps_in_logits_are_linear_in_the_target
 9 all classes are the single ones: targets_agree_with_each_other, P all_classes_equal_single_ones
10 batch mates change nothing: pictures_of_a_batch_do_not_touch_each_other, M every_method_keeps_pictures_apart
11 normalised maps: M normalised_maps
12 zeros, NaN: zero_features_give_a_zero_map, nan_is_named, M rules_never_give_nan
13 state: state_is_untouched, an_exception_leaves_nothing, ctrl_c_at_any_moment
14 same bits: same_bits_whatever_the_mode, training_mode_gives_the_evaluation_map_and_comes_back
15 in place: in_place_operation_behind_the_layer, P the_last_conv_of_vgg_is_a_trap
16 threads: two_threads_at_once, a_call_inside_a_call, M two_threads_run_heads_again
17 compile, half precision: wrappers_are_unwrapped, other_precisions_give_float32_maps,
   autocast_gives_close_maps_and_leaves_its_cache_alone
18 upsampling: M fused_maps_sit_where_their_layers_are (and D)
19 equivariance: flipping_the_picture_flips_the_map, moving_the_picture_moves_the_map, M turns_come_back
20 synthetic truth: evidence_in_one_quadrant
21 randomised weights: M new_weights_make_a_new_map
22 deterministic: two_calls_give_the_same_bits
23 errors: wrong_targets, wrong_layers, wrong_method, wrong_pictures, wrong_models, channels_last_is_recognised
"""
from __future__ import annotations

import gc
import random
import signal
import threading
import time
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from skin_gradcam import engine
from skin_gradcam import gradcam as room
from skin_gradcam.gradcam import METHODS, closed_form, completeness_gap, find_layer, gradcam, record

ALL = [m for m in METHODS if m != 'legrad']          # which is for vision transformers: test_methods.py


class Net(nn.Module):
    "BatchNorm, dropout, an in-place ReLU behind the last convolution, functional pooling"
    def __init__(self, inplace: bool = True, classes: int = 3):
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, 2, 1)
        self.relu, self.drop, self.fc = nn.ReLU(inplace=inplace), nn.Dropout(.5), nn.Linear(6, classes)
        self.behind = lambda f: f                    # what happens between layer and head

    def forward(self, x):
        f = self.relu(self.conv2(self.bn(self.conv1(x)).relu()))
        return self.fc(self.drop(self.behind(f).mean((2, 3))))


def make(**kw) -> Net:
    torch.manual_seed(0)
    net = Net(**kw)
    net.bn.running_mean.uniform_(-.2, .2)
    return net.eval()


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def net() -> Net: return make()


@pytest.fixture(scope='module')
def x() -> torch.Tensor: return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def truth(x) -> torch.Tensor:
    "Maps of all classes, worked out without the room"
    net = make()
    with torch.no_grad():
        f = net.relu(net.conv2(net.bn(net.conv1(x)).relu()))
        return torch.einsum('ck,bkhw->bchw', net.fc.weight, f) / f[0, 0].numel()


def state(model: nn.Module) -> list:
    "All that a call could disturb"
    return [[m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()], [p.detach().clone() for p in model.parameters()],
            [b.clone() for b in model.buffers()],
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()),
            torch.get_rng_state(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled('cpu'), len(engine._held), engine._lock.locked()]


def same(a, b) -> bool:
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a is b or (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


def rel(a: torch.Tensor, b: torch.Tensor) -> float: return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------- modes


def test_methods_give_the_known_maps(net, x, truth):
    for method in ('gradcam', 'hirescam', 'cam'): assert rel(gradcam(net, x, 'all', method), truth) < 1e-6
    assert find_layer(net, x) == ('relu', net.relu)
    assert completeness_gap(gradcam(net, x, 'all'), net(x).detach(), net.fc.bias.detach()).abs().max() < 1e-6


@pytest.mark.parametrize('method', ALL)
def test_same_bits_whatever_the_mode(net, x, method):
    expected = gradcam(net, x, 'all', method)
    with torch.no_grad(): assert torch.equal(gradcam(net, x, 'all', method), expected)
    with torch.inference_mode():
        inside = x.clone()
        assert inside.is_inference()
        assert torch.equal(gradcam(net, x, 'all', method), expected)
        assert torch.equal(gradcam(net, inside, 'all', method), expected)
        assert torch.equal(gradcam(net, inside, method=method), gradcam(net, x, None, method))
        assert torch.equal(gradcam(net, inside, lambda o: o[:, 0] - o[:, 2], method),
                           gradcam(net, x, lambda o: o[:, 0] - o[:, 2], method))
    assert torch.equal(gradcam(net, inside, 'all', method), expected)
    for p in net.parameters(): p.requires_grad_(False)
    assert torch.equal(gradcam(net, x, 'all', method), expected)
    with torch.no_grad(): assert torch.equal(gradcam(net, x, 'all', method), expected)
    assert not expected.requires_grad
    want = x.clone().requires_grad_()
    assert torch.equal(gradcam(net, want, 'all', method), expected) and want.grad is None


@pytest.mark.parametrize('method', ALL)
def test_training_mode_gives_the_evaluation_map_and_comes_back(net, x, method):
    expected = gradcam(net, x, 'all', method)
    net.train()
    net.bn.eval()
    before = state(net)
    assert torch.equal(gradcam(net, x, 'all', method), expected)
    assert same(before, state(net)) and net.drop.training and not net.bn.training


def test_weights_made_under_inference_mode_are_named(x):
    with torch.inference_mode(): net = make()
    with pytest.raises(ValueError, match='make or load the model outside it'): gradcam(net, x)
    assert torch.is_grad_enabled() and not any(m._forward_hooks for m in net.modules())


def test_in_place_operation_behind_the_layer(x):
    for layer in ('conv2', 'relu', 'bn', 'conv1'):
        for method in ('gradcam', 'hirescam'):
            assert torch.equal(gradcam(make(inplace=True), x, 'all', method, layer),
                               gradcam(make(inplace=False), x, 'all', method, layer))


def test_residual_addition_in_place(x):
    net, other = make(), make()
    net.behind = lambda f: f.add_(1).mul_(2)
    other.behind = lambda f: (f + 1) * 2
    assert torch.equal(gradcam(net, x, 'all'), gradcam(other, x, 'all'))


def test_a_model_that_writes_on_its_input_does_not_write_on_ours(x):
    net, ours = make(), x.clone()
    class Normalising(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x): return self.net(x.sub_(.5).div_(.5))
    first = gradcam(Normalising(), ours, 'all')
    assert torch.equal(ours, x)
    assert torch.equal(first, gradcam(net, (x - .5) / .5, 'all'))


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize(('dtype', 'tol'), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2), (torch.float64, 1e-5)])
@pytest.mark.parametrize('method', [m for m in ALL if m != 'random'])       # whose dice are the bits of the picture
def test_other_precisions_give_float32_maps(net, x, dtype, tol, method):
    expected = gradcam(net, x, 'all', method)
    mixed = gradcam(net, x.to(dtype), 'all', method)                  # the input only
    assert mixed.dtype == torch.float32 and rel(mixed, expected) < tol
    whole = gradcam(net.to(dtype), x.to(dtype), 'all', method)         # the model as well
    assert whole.dtype == torch.float32 and whole.isfinite().all() and rel(whole, expected) < tol


def test_the_slope_of_a_probability_survives_half_precision(net, x):
    net.fc.bias.data[0] = 8                       # certain of class 0: the slope of its probability is below 1e-3
    target = lambda logits: logits.softmax(1)[:, 0]
    expected = gradcam(net, x, target)
    assert 0 < expected.abs().max() < 1e-5          # gradients of some 1e-7: float16 ends there
    got = gradcam(net.half(), x.half(), target)
    assert got.abs().max() > 0 and rel(got, expected) < .1


def test_autocast_gives_close_maps_and_leaves_its_cache_alone(net, x):
    expected = gradcam(net, x, 'all')
    def step(explain):
        net.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16):
            maps = gradcam(net, x, 'all') if explain else None
            F.cross_entropy(net(x), torch.tensor([0, 1, 2, 0])).backward()
        return maps, [p.grad for p in net.parameters()]
    _, plain = step(False)
    maps, explained = step(True)
    assert all(g is not None for g in explained) and same(plain, explained)
    assert maps.dtype == torch.float32 and rel(maps, expected) < 5e-2


# ---------------------------------------------------------------- threads, training loops, wrappers


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('target', [None, 'all'])
def test_two_threads_at_once(net, x, training, target):
    inputs = [x, x.flip(0) * 2]
    expected = [gradcam(net, o, target) for o in inputs]
    net.train(training)
    before, got, barrier = state(net), {}, threading.Barrier(2, timeout=20)
    def meet(f):
        barrier.wait()                          # both are behind the layer now, neither has taken its gradient
        return f
    net.behind = meet
    def work(i): got[i] = [gradcam(net, inputs[i], target) for _ in range(5)]
    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(torch.equal(m, expected[i]) for i in (0, 1) for m in got[i])
    assert same(before[:-2], state(net)[:-2]) and not engine._held


def test_two_threads_look_for_the_layer_at_once(x):
    net, got, barrier = make(), {}, threading.Barrier(2, timeout=20)
    net.behind = lambda f: (barrier.wait(), f)[1]
    threads = [threading.Thread(target=lambda i=i: got.__setitem__(i, gradcam(net, x))) for i in (0, 1)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], gradcam(make(), x))


def test_a_plain_forward_in_another_thread_is_left_alone(net, x):
    expected, graph = gradcam(net, x), {}
    inside, leave = threading.Event(), threading.Event()
    def wait(f):
        if threading.current_thread() is worker: inside.set(); leave.wait(20)
        return f
    net.behind = wait
    def work(): graph['maps'] = gradcam(net, x)
    worker = threading.Thread(target=work)
    worker.start()
    inside.wait(20)
    with torch.no_grad(): assert not net(x).requires_grad          # its hook is on the layer, and lets us through
    assert net(x).requires_grad
    leave.set()
    worker.join()
    assert torch.equal(graph['maps'], expected)


def test_a_training_loop_is_not_disturbed(x):
    def train(explain):
        net = make().train()
        torch.manual_seed(5)
        opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
        for _ in range(4):
            if explain: gradcam(net, x)
            loss = F.cross_entropy(net(x), torch.tensor([0, 1, 2, 0]))
            if explain: gradcam(net, x, 'all')
            opt.zero_grad()
            loss.backward()
            if explain: gradcam(net, x, lambda o: o[:, 1] - o[:, 0], 'hirescam', ['bn', 'conv2'])
            opt.step()
        return [*net.parameters(), *net.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
def test_fastai_learner_and_validation_callback(x):
    import fastai.callback.progress  # noqa: F401  gives Learner no_bar
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    pairs = [(o, i % 3) for i, o in enumerate(torch.cat([x, x]))]
    dls = DataLoaders(torch.utils.data.DataLoader(pairs, 4), torch.utils.data.DataLoader(pairs, 4))
    seen = []
    class Explain(Callback):
        def after_pred(self):
            if not self.training: seen.append(gradcam(self.learn, self.x, 'all'))
    def fit(*cbs):
        torch.manual_seed(0)
        learn = Learner(dls, make(), loss_func=nn.CrossEntropyLoss(), cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
        return learn
    plain, explained = fit(), fit(Explain())
    assert len(seen) == 4 and seen[0].shape == (4, 3, 8, 8)
    assert same([*plain.model.state_dict().values()], [*explained.model.state_dict().values()])
    assert torch.equal(gradcam(explained, x), gradcam(explained.model, x))


def test_a_learner_with_a_head_that_looks_at_places_is_told(x):
    class Learner: model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    with pytest.warns(UserWarning, match="method='hirescam'"): gradcam(Learner(), x)


@pytest.mark.parametrize('method', ['gradcam', 'ablationcam', 'scorecam'])
def test_validation_step_of_a_trainer(x, method):
    "As Lightning does it: the model explains itself in its validation step, in eval, under inference_mode, mid-epoch"
    class Module(nn.Module):
        def __init__(self, explain): super().__init__(); self.net, self.explain, self.seen = make(), explain, []
        def forward(self, x): return self.net(x)
        def training_step(self, batch): return F.cross_entropy(self(batch), torch.tensor([0, 1, 2, 0]))
        def validation_step(self, batch):
            if self.explain: self.seen.append(gradcam(self, batch, 'all', method))
            return self(batch).argmax(1)
    def fit(explain):
        torch.manual_seed(3)
        module = Module(explain).train()
        opt = torch.optim.Adam(module.parameters(), 1e-2)
        for _ in range(3):
            module.training_step(x).backward()
            module.eval()                                             # the sanity check, before the optimiser's step
            with torch.inference_mode(): module.validation_step(x.clone())
            module.train()
            opt.step()
            opt.zero_grad()
        return module
    plain, explained = fit(False), fit(True)
    assert same([*plain.state_dict().values()], [*explained.state_dict().values()])
    assert len(explained.seen) == 3 and all(m.isfinite().all() for m in explained.seen)
    assert not torch.equal(explained.seen[0], explained.seen[2])


def test_wrappers_are_unwrapped(net, x):
    expected = gradcam(net, x, 'all')
    assert torch.equal(gradcam(nn.DataParallel(net), x, 'all'), expected)
    assert torch.equal(gradcam(torch.compile(net, backend='aot_eager'), x, 'all'), expected)
    compiled = torch.compile(net, backend='aot_eager')
    with torch.no_grad(): compiled(x)                                  # compiled before the hook came
    assert torch.equal(gradcam(compiled, x, 'all'), expected)
    net.compile(backend='aot_eager')
    with torch.no_grad(): net(x)
    assert torch.equal(gradcam(net, x, 'all'), expected)


def test_a_call_inside_a_call(net, x):
    other, inner = make(classes=5), []
    def target(logits):
        inner.append((gradcam(net, x), gradcam(other, x)))             # the same model, and another
        return logits[:, 0]
    assert torch.equal(gradcam(net, x, target), gradcam(net, x, 0))
    assert torch.equal(inner[0][0], gradcam(net, x)) and torch.equal(inner[0][1], gradcam(other, x))
    net.behind = lambda f: f * gradcam(other, x).sigmoid().mean()      # and one in the middle of the forward pass
    assert gradcam(net, x).isfinite().all() and torch.is_grad_enabled()


# ---------------------------------------------------------------- nothing left behind


class Broken(Exception): pass


@pytest.mark.parametrize('error', [Broken, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('where', ['before', 'behind', 'target'])
def test_an_exception_leaves_nothing(net, x, error, where):
    net.train()
    F.cross_entropy(net(x), torch.tensor([0, 1, 2, 0])).backward()
    find_layer(net, x)
    before = state(net)
    def fail(*args): raise error
    if where == 'before': hook = net.conv2.register_forward_pre_hook(fail)
    net.behind = fail if where == 'behind' else net.behind
    with pytest.raises(error): gradcam(net, x, fail if where == 'target' else 'all', layer=['bn', 'conv2', None])
    if where == 'before': hook.remove()
    assert same(before, state(net))


def test_looking_for_the_layer_leaves_nothing_when_it_fails(net, x):
    net.train()
    before = state(net)
    def fail(f): raise Broken
    net.behind = fail
    with pytest.raises(Broken): find_layer(net, x)
    assert same(before, state(net)) and net not in engine._found


@pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='needs POSIX timers')
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')      # one that struck in a gc callback
@pytest.mark.parametrize(('method', 'times'), [('gradcam', 300), ('ablationcam', 100)])
def test_ctrl_c_at_any_moment(x, method, times):
    net, rng, dice, hits = make().train(), random.Random(0), torch.Generator(), 0
    net.behind = lambda f: f * f                                       # so that ablation has to run the head again
    gradcam(net, x, 'all', method)
    began = time.perf_counter()
    gradcam(net, x, 'all', method, ['conv2', None])
    duration = time.perf_counter() - began
    before = state(net)
    def interrupt(*args): raise KeyboardInterrupt
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(times):
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, rng.random() * duration))
                gradcam(net, x, 'all', method, layer=['conv2', None])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt: hits += 1
            finally: signal.setitimer(signal.ITIMER_REAL, 0)
            assert same(before, state(net))
            torch.rand(1, generator=dice)                              # fails where a batching mode was left on
    finally: signal.signal(signal.SIGALRM, old)
    assert hits > times / 6


def test_state_is_untouched(net, x):
    net.train()
    F.cross_entropy(net(x), torch.tensor([0, 1, 2, 0])).backward()
    for p in net.conv1.parameters(): p.requires_grad_(False)
    before = state(net)
    for method in ALL:
        for target in (None, 1, [0, 1, 2, 0], 'all', lambda o: o.softmax(1)[:, 0]): gradcam(net, x, target, method)
    room.smoothed(net, x, over='turns')
    room.smoothed(net, x, over='noise')
    gradcam(net, x, layer=['conv1', 'conv2'])
    with torch.no_grad(): gradcam(net, x)
    find_layer(net, x)
    assert same(before, state(net))


def test_the_model_is_not_kept_alive(x):
    net = make()
    maps = gradcam(net, x, 'all')
    gone = weakref.ref(net)
    assert net in engine._found
    del net
    gc.collect()
    assert gone() is None and maps.isfinite().all()


def test_many_calls_keep_nothing(net, x):
    def live(): return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    small = x[:1, :, :16, :16]
    for _ in range(20): gradcam(net, small, 'all')
    gc.collect()
    before = live()
    gc.disable()                                    # nothing may hang in a cycle
    try:
        for i in range(300): gradcam(net, small, 'all' if i % 2 else None, ('gradcam', 'cam')[i % 3 == 0])
        for method in ALL: gradcam(net, small, None, method)
        net.behind = abs                            # a head of its own: the tape
        gradcam(net, small, None, 'ablationcam')
        assert live() == before
    finally: gc.enable()
    assert not any(m._forward_hooks for m in net.modules())


def test_only_the_head_is_recorded(x):
    model = torchvision.models.resnet18(num_classes=3).eval()
    weights, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    def pack(t): sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
    big = torch.randn(2, 3, 96, 96)
    find_layer(model, big)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): gradcam(model, big, 'all')
    assert sum(v for k, v in sizes.items() if k not in weights) / 2 < .01 * 2**20


# ---------------------------------------------------------------- batches, targets, layers


def test_pictures_of_a_batch_do_not_touch_each_other(net, x):
    together = gradcam(net, x, 'all')
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(gradcam(net, x[order], 'all'), together[order])
    assert rel(torch.cat([gradcam(net, o[None], 'all') for o in x]), together) < 1e-6
    other = x.clone()
    other[1:] *= 100
    assert torch.equal(gradcam(net, other, 'all')[0], together[0])
    assert torch.equal(gradcam(net, x[[0, 0, 0, 0]], 'all'), together[[0, 0, 0, 0]])
    doubled = gradcam(net, torch.cat([x, x]), 'all')
    assert torch.equal(doubled[:4], doubled[4:]) and rel(doubled[:4], together) < 1e-6


def test_two_calls_give_the_same_bits(net, x):
    for method in ALL:
        assert torch.equal(gradcam(net, x, 'all', method), gradcam(net, x, 'all', method))


def test_targets_agree_with_each_other(net, x):
    every, top = gradcam(net, x, 'all'), net(x).argmax(1)
    rows = torch.arange(4)
    assert torch.equal(gradcam(net, x), every[rows, top])
    for classes in ([0, 2, 1, 1], (0, 2, 1, 1), torch.tensor([0, 2, 1, 1]), np.array([0, 2, 1, 1])):
        assert torch.equal(gradcam(net, x, classes), every[rows, [0, 2, 1, 1]])
    for one in (2, np.int64(2), torch.tensor(2)): assert torch.equal(gradcam(net, x, one), every[:, 2])
    assert rel(gradcam(net, x, lambda o: o[:, 2] - o[:, 0]), every[:, 2] - every[:, 0]) < 1e-6
    assert rel(gradcam(net, x, lambda o: 1e-9 * o[:, 1]), 1e-9 * every[:, 1]) < 1e-6
    assert torch.equal(gradcam(net, x, lambda o: -o[:, 1]).relu(), (-every[:, 1]).relu())
    p = net(x).softmax(1).detach()
    mixed = gradcam(net, x, lambda o: (p * o).sum(1))
    assert rel(mixed, torch.einsum('bc,bchw->bhw', p, every)) < 1e-6
    flat = gradcam(net, x, lambda o: (o * 0).sum(1))
    assert torch.equal(flat, torch.zeros_like(flat))                    # no slope: zeros, never NaN


def test_many_classes_do_not_need_many_gradients_at_once(x, monkeypatch):
    net, whole, alive = make(classes=40), room.gradients, []
    def watched(rec, v):
        kept = []
        for gs in whole(rec, v):
            kept.append(weakref.ref(gs[0]))
            alive.append(sum(g() is not None for g in kept))
            yield gs
    monkeypatch.setattr(room, 'gradients', watched)
    assert gradcam(net, x, 'all', 'hirescam').shape == (4, 40, 8, 8)
    assert len(alive) == 40 and max(alive) <= 2


def test_a_head_with_a_function_of_its_own(net, x):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x * 2
        @staticmethod
        def backward(ctx, g):
            assert float(g.abs().sum()) > 0           # looks at the number, so vmap could not batch it
            return g * 2
    every = gradcam(net, x, 'all')
    net.behind = Twice.apply
    assert rel(gradcam(net, x, 'all'), 2 * every) < 1e-6


def test_several_layers_in_one_pass(net, x):
    runs = []
    net.conv1.register_forward_hook(lambda m, i, o: runs.append(1))
    several = gradcam(net, x, 'all', layer=['conv2', net.conv1, 'bn', 'relu', None])
    assert len(runs) == 2                                              # one to find the layer, one for all the maps
    single = [gradcam(net, x, 'all', layer=o) for o in ('conv2', 'conv1', 'bn', 'relu', None)]
    assert all(rel(a, b) < 1e-5 for a, b in zip(several, single, strict=True))
    assert isinstance(gradcam(net, x, layer=('conv1',)), list)


def test_the_automatic_layer_follows_the_model(x):
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Sequential(nn.Conv2d(3, 6, 4, 4)), nn.Linear(6, 3)
        def forward(self, x): return self.fc(self.body(x).mean((2, 3)))
    net = Growing().eval()
    assert find_layer(net, x)[0] == 'body'
    del net.body[0]
    net.body.append(nn.Conv2d(3, 6, 8, 8))
    assert find_layer(net, x)[1] is net.body
    net.body = nn.Conv2d(3, 6, 2, 2)
    assert find_layer(net, x)[1] is net.body and gradcam(net, x).shape == (4, 16, 16)


ZOO = dict(resnet18='layer4', mobilenet_v3_small='features', densenet121='features', regnet_y_400mf='trunk_output',
           swin_t='permute', squeezenet1_1='classifier.2')


@pytest.mark.parametrize(('name', 'layer'), ZOO.items())
def test_layers_of_torchvision(name, layer):
    torch.manual_seed(0)
    model, batch = torchvision.models.get_model(name, weights=None, num_classes=3), torch.randn(1, 3, 96, 96)
    assert find_layer(model, batch)[0] == layer
    maps = gradcam(model, batch, 'all')
    assert maps.shape[:2] == (1, 3) and maps.isfinite().all() and maps.abs().max() > 0


@pytest.mark.parametrize(('name', 'kw'), [('tf_efficientnet_lite0', {}), ('convnext_atto', {}), ('resnet10t', {}),
                                          ('swin_tiny_patch4_window7_224', dict(img_size=96, window_size=3))])
def test_layers_of_timm(name, kw):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kw).eval()
    batch = torch.randn(2, 3, 96, 96)
    assert gradcam(model, batch, 'all').shape == (2, 3, 3, 3)
    assert rel(gradcam(model, batch, 'all'), gradcam(model, batch, 'all', 'hirescam')) < 1e-5
    if name != 'convnext_atto':                       # which normalises between pooling and classifier
        w, b = model.get_classifier().weight.detach(), model.get_classifier().bias.detach()
        rec = record(model, batch)
        assert rel(gradcam(model, batch, 'all'), closed_form(w, rec.features[0])) < 1e-5
        assert completeness_gap(gradcam(model, batch, 'all'), rec.logits.detach(), b).abs().max() < 1e-5


def test_channels_last_is_recognised():
    torch.manual_seed(0)
    model, batch = torchvision.models.swin_t(weights=None, num_classes=3).eval(), torch.randn(1, 3, 96, 96)
    maps = gradcam(model, batch, 'all', layer=['norm', 'permute', 'features'])
    assert [m.shape for m in maps] == [(1, 3, 3, 3)] * 3               # not (3, 768)
    assert rel(maps[0], maps[1]) < 1e-6


def test_a_vision_transformer_is_refused():
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3)
    with pytest.raises(ValueError, match=r"no map .* name a layer with layer=; maps in it: 'conv_proj' \(4x4\)"):
        gradcam(model, torch.randn(1, 3, 32, 32))


# ---------------------------------------------------------------- worked-out maps


def test_flatten_and_linear(x):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.Flatten(), nn.Linear(5 * 16, 3)).eval()
    a, w = net[0](x).detach(), net[2].weight.detach().view(3, 5, 4, 4)
    assert rel(gradcam(net, x, 'all', 'hirescam'), torch.einsum('ckhw,bkhw->bchw', w, a)) < 1e-6
    assert rel(gradcam(net, x, 'all', 'gradcam'), torch.einsum('ck,bkhw->bchw', w.mean((2, 3)), a)) < 1e-6
    scores, bias = net(x).detach(), net[2].bias.detach()
    def gap(method): return completeness_gap(gradcam(net, x, 'all', method), scores, bias).abs().max()
    assert gap('hirescam') < 1e-5 and gap('gradcam') > .05
    with pytest.raises(ValueError, match='hirescam'): gradcam(net, x, method='cam')


def test_piecewise_linear_head_without_bias_is_complete(x):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(80, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False))
    net = nn.Sequential(nn.Conv2d(3, 5, 8, 8), head).eval()
    assert (gradcam(net, x, 'all', 'hirescam').sum((2, 3)) - net(x)).abs().max() < 1e-5


def test_pooling_and_any_head_makes_gradcam_hirescam(x):
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 3))
    net = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.ReLU(inplace=True), head)
    assert rel(gradcam(net, x, 'all'), gradcam(net, x, 'all', 'hirescam')) < 1e-6


def test_flipping_the_picture_flips_the_map(x):
    torch.manual_seed(0)
    net = make()
    for c in (net.conv1, net.conv2): c.weight.data = (c.weight.data + c.weight.data.flip(3)) / 2
    odd = F.interpolate(x, size=(33, 33), mode='bilinear')             # with stride 2, an odd side has a middle
    assert rel(gradcam(net, odd.flip(3), 'all'), gradcam(net, odd, 'all').flip(3)) < 1e-5


def test_moving_the_picture_moves_the_map():
    "By the stride of the net, for a net without padding, away from the edge"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(5, 3))
    x = torch.randn(2, 3, 32, 32)
    moved = gradcam(net, x.roll((4, 8), (2, 3)), 'all')
    assert rel(moved, gradcam(net, x, 'all').roll((1, 2), (2, 3))) < 1e-5


def test_evidence_in_one_quadrant():
    class Quadrant(nn.Module):
        def __init__(self): super().__init__(); self.pool = nn.AvgPool2d(4)
        def forward(self, x): return self.pool(x)[:, :, :4, 4:].sum((2, 3))
    x = torch.rand(2, 3, 32, 32) + .1
    m = gradcam(Quadrant(), x, 0, 'hirescam')
    outside = m.clone()
    outside[:, :4, 4:] = 0
    assert torch.equal(outside, torch.zeros_like(m)) and (m[:, :4, 4:] > 0).all()
    assert torch.allclose(m.sum((1, 2)), Quadrant()(x)[:, 0])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(('target', 'error'), [(3, IndexError), (-1, IndexError), ([0, 1, 2, 3], IndexError),
    ([0, 1], ValueError), ('mel', ValueError), (1., ValueError), ([0, 1, 2, None], ValueError), (True, ValueError),
    (lambda o: o.sum(), ValueError), (lambda o: o.argmax(1), ValueError), (lambda o: o[:, 0] - o.mean(), ValueError),
    (lambda o: o[:, 0].softmax(0), ValueError), (lambda o: 1, ValueError)])
def test_wrong_targets(net, x, target, error):
    with pytest.raises(error, match=r'allowed are None, a class 0\.\.2, 4 such classes|the target function'):
        gradcam(net, x, target)


class Aside(Net):
    def forward(self, x):
        self.conv1(x)
        return super().forward(x)


class Unused(Net):
    def __init__(self): super().__init__(); self.spare = nn.Conv2d(3, 4, 1)


class Cutting(Net):
    "Switches gradients off behind the layer"
    def forward(self, x):
        f = self.conv2(self.bn(self.conv1(x)))
        with torch.no_grad(): f = f.relu()
        return self.fc(f.mean((2, 3)).detach())


@pytest.mark.parametrize(('model', 'layer', 'words'), [
    (Net, 'fc', r"layer 'fc' gives \[4, 3\], which is no map .*layers that give one: .*'relu' \(8x8\)"),
    (Net, 'conv3', r"no layer 'conv3' in this Net; near it: 'conv"),
    (Net, nn.ReLU(), 'layer is a ReLU that is no part of this Net'),
    (Net, 3, 'layer is a int that is no part'),
    (Net, [], 'empty list'),
    (Aside, 'conv1', "layer 'conv1' ran 2 times in one forward pass"),
    (Unused, 'spare', "layer 'spare' was not reached"),
    (Cutting, 'conv2', "do not depend on layer 'conv2', or the model cuts the gradient behind it"),
])
def test_wrong_layers(x, model, layer, words):
    net = model()
    before = state(net)
    with pytest.raises(ValueError, match=words): gradcam(net, x, layer=layer)
    assert same(before, state(net))


def test_wrong_method(net, x):
    with pytest.raises(ValueError, match="method 'gradcam\\+': allowed are cam, gradcam, hirescam, gradcam.*random"):
        gradcam(net, x, method='gradcam+')


@pytest.mark.parametrize('bad', [torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
                                 np.zeros((1, 3, 32, 32)), torch.zeros(0, 3, 32, 32)])
def test_wrong_pictures(net, bad):
    with pytest.raises(ValueError, match=r'give a batch of normalised pictures, a float tensor \[B,3,H,W\]'):
        gradcam(net, bad)


def test_wrong_models(net, x):
    with pytest.raises(ValueError, match='give an eager nn.Module or a fastai Learner'): gradcam('resnet18', x)
    with pytest.raises(ValueError, match=r'the model gives tuple: it must give logits \[B,C\]'):
        net.fc = type('Pair', (nn.Linear,), {'forward': lambda self, x: (x, x)})(6, 3)
        gradcam(net, x)


def test_nan_is_named(net, x):
    bad = x.clone()
    bad[2, 0, 5, 5] = float('nan')
    with pytest.raises(ValueError, match='logits of picture 2 are NaN or infinite'): gradcam(net, bad)


def test_zero_features_give_a_zero_map(net, x):
    net.conv2.weight.data.zero_()
    net.conv2.bias.data.fill_(-1)
    zeros = torch.zeros(4, 3, 8, 8)
    for method in ALL: assert torch.equal(gradcam(net, x, 'all', method), zeros), method
