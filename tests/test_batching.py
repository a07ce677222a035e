"""What has no place on the page of batching: many threads at once, pictures that break, callers that give up, a close
in the middle; and the real network, whose answer to a picture must not depend on its company."""
from __future__ import annotations

import io
import random
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from skin_gradcam.batching import Batcher, Busy, Closed, Late, gather
from skin_gradcam.inference import Explainer, Prepared
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.pictures import Limits, PictureError


class Echo:
    "An explainer that answers with the names, is slow at times, and breaks on one name in fifty"
    limits, bundle = Limits(), None

    def __init__(self): self.dice, self.most, self.seen = random.Random(0), 0, []

    def answer(self, prepared):
        names = [p.name for p in prepared]
        self.most = max(self.most, len(names))
        self.seen += names
        if self.dice.random() < .05: time.sleep(.002)
        if any(int(n) % 50 == 7 for n in names): raise RuntimeError('broken')
        return names


def named(i: int) -> Prepared: return Prepared(str(i), np.zeros(1), None, None)


def test_no_answer_is_lost_or_mixed():
    "Ten thousand pictures from sixteen threads: each gets its own answer, its own error, or is given up"
    b, kinds = Batcher(Echo(), max_batch=8, queue_size=64, threads=2), []

    def ask(i: int) -> str:
        dice = random.Random(i)
        while True:
            try: f = b.submit(named(i), timeout=None if dice.random() < .9 else 1e-4)
            except Busy as e:
                assert e.retry_after >= 1
                time.sleep(.001)
                continue
            break
        if dice.random() < .05 and f.cancel(): return 'cancelled'
        try: got = f.result(30)
        except RuntimeError: return 'broken' if i % 50 == 7 else 'WRONG'
        except Late: return 'late'
        return 'answered' if got == str(i) and i % 50 != 7 else 'WRONG'

    with ThreadPoolExecutor(16) as pool: kinds = list(pool.map(ask, range(10_000)))
    assert b.close() == 0
    counts = {k: kinds.count(k) for k in set(kinds)}
    s = b.stats()
    assert counts.get('WRONG', 0) == 0 and counts['answered'] > 8000 and counts['broken'] > 100
    assert (s['answered'], s['failed'], s['timed_out'], s['cancelled']) == tuple(
        counts.get(k, 0) for k in ('answered', 'broken', 'late', 'cancelled'))
    assert (s['queued'], s['running']) == (0, 0) and 1 < b.explainer.most <= 8
    assert not any(t.is_alive() for t in b.threads)


def test_what_was_given_up_never_ran():
    b = Batcher(Echo(), queue_size=1000)
    futures = [b.submit(named(1000 + 50 * i)) for i in range(500)]
    gave_up = {str(1000 + 50 * i) for i, f in enumerate(futures) if i % 2 and f.cancel()}
    b.close()
    assert gave_up and not gave_up & set(b.explainer.seen)


def test_a_close_in_the_middle_leaves_nobody_waiting():
    "Whatever the moment: each caller gets an answer or is told that the service is closed"
    closed = 0   # on a quick machine a close can come after the last answer, but not each time
    for seed in range(20):
        b, told = Batcher(Echo(), queue_size=500), []

        def ask(start: int, b=b, told=told) -> None:
            for i in range(start, start + 50 * 40, 50):
                try: told.append(b.submit(named(i)).result(10))
                except Closed: told.append('closed')

        threads = [threading.Thread(target=ask, args=(k,)) for k in (1, 2, 3, 4)]
        for t in threads: t.start()
        time.sleep(random.Random(seed).random() * .01)
        b.close(drain=seed % 2 == 0)
        for t in threads: t.join(10)
        assert not any(t.is_alive() for t in threads) and len(told) == 160
        closed += 'closed' in told
    assert closed


def test_decoding_is_bounded():
    "A hundred uploads wait, two are decoded at a time"
    busy, most, lock = [], [], threading.Lock()

    b = Batcher(Echo(), queue_size=200, decoders=2)

    def decode():
        with lock: busy.append(1); most.append(len(busy))
        time.sleep(.002)
        with lock: busy.pop()
        return named(1)

    import skin_gradcam.batching as module
    jobs = [module._Job(decode, float('inf')) for _ in range(100)]
    futures = module._enter(b, jobs)
    assert [f.result(10) for f in futures] == ['1'] * 100 and max(most) == 2
    b.close()


class Counting(Echo):
    "Notes how many runs there are at the same time, and their sizes"
    def __init__(self): self.lock, self.now, self.runs, self.sizes = threading.Lock(), 0, 0, []

    def answer(self, prepared):
        with self.lock: self.now += 1; self.runs = max(self.runs, self.now); self.sizes.append(len(prepared))
        time.sleep(.005)
        with self.lock: self.now -= 1
        return [p.name for p in prepared]


@pytest.mark.parametrize('threads, decoders', [(1, 4), (2, 3), (3, 1)])
def test_runs_are_bounded_and_all_workers_find_work(threads, decoders):
    "Whoever is free takes what is due, but no more run the network at a time than may"
    with Batcher(Counting(), max_batch=2, queue_size=200, threads=threads, decoders=decoders) as b:
        futures = [b.submit(named(i)) for i in range(60)]
        assert [f.result(10) for f in futures] == [str(i) for i in range(60)]
        assert len(b.threads) == max(threads, decoders) and b.explainer.runs == threads
    assert b.stats()['queued'] == b.stats()['running'] == 0


@pytest.mark.parametrize('decoders', [1, 2])
def test_a_batch_that_may_wait_is_filled(decoders):
    "Also where one worker both decodes and runs"
    import skin_gradcam.batching as module
    with Batcher(Counting(), max_batch=4, max_wait=.5, queue_size=200, decoders=decoders) as b:
        futures = module._enter(b, [module._Job(lambda i=i: named(i), float('inf')) for i in range(12)])
        assert [f.result(10) for f in futures] == [str(i) for i in range(12)]
    assert b.explainer.sizes == [4, 4, 4]


@pytest.mark.alone
def test_the_time_for_busy_counts_decoding():
    import skin_gradcam.batching as module

    def slowly(): time.sleep(.05); return named(1)
    with Batcher(Echo(), decoders=1) as b:
        for _ in range(20): module._enter(b, [module._Job(slowly, float('inf'))])[0].result(10)
        time.sleep(.05)
        assert .04 < b.pace < .2


@pytest.fixture(scope='module')
def uploads() -> list[bytes]:
    made = []
    for i, kind in enumerate(['JPEG', 'PNG', 'WEBP', 'BMP'] * 6):
        buf = io.BytesIO()
        Image.fromarray(draw_phantom(CLASSES[i % 3], seed=i, width=200, height=150).image).save(buf, kind)
        made.append(buf.getvalue())
    return made


def test_company_does_not_change_an_answer(uploads):
    "The real network: three hundred pictures from sixteen threads, in batches of changing size, against one by one"
    explainer = Explainer.load(backend='runtime')
    alone = [explainer(d, name=str(i), keep_side=0) for i, d in enumerate(uploads)]
    far = [np.abs(a.p - c.p).max() for k, a in enumerate(alone) for c in alone[:k]]
    assert min(far) > 1e-4                                 # else a mixed answer could pass for the right one
    with Batcher(explainer) as b, ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda k: (k % 24, b.explain(uploads[k % 24], keep_side=0).result(60)), range(300)))
        sizes = b.stats()['batch_sizes']
    assert max(sizes) > 1
    for i, a in got:
        assert a.decision == alone[i].decision and a.notes == alone[i].notes
        assert np.abs(a.p - alone[i].p).max() < 1e-5 and np.abs(a.maps - alone[i].maps).max() < 1e-4


def test_a_request_of_good_and_bad_pictures(uploads):
    "Unreadable ones come back in their place, too many are refused as one"
    with Batcher(Explainer.load(backend='runtime'), queue_size=4) as b:
        pictures = [('a', uploads[0]), ('b', b'GIF89a'), ('c', uploads[1]), ('d', b'')]
        got = gather(b.explain_all(pictures, keep_side=0), 60)
        assert [isinstance(g, PictureError) for g in got] == [False, True, False, True]
        with pytest.raises(Busy): b.explain_all([('x', d) for d in uploads[:5]])
        assert b.stats()['refused'] == 5 and b.stats()['unreadable'] == 2


def test_gather_lets_no_failed_run_pass():
    "A run that fails ends the request, and what has not begun is cancelled"
    b = Batcher(Echo(), max_batch=1)
    bad, other = b.submit(named(7)), b.submit(named(8))
    with pytest.raises(RuntimeError): gather([bad, other], 10)
    try: assert other.result(10) == '8'                    # it may have begun
    except CancelledError: pass
    assert b.close() == 0


def test_wrong_settings_are_refused():
    for kw in (dict(max_batch=0), dict(queue_size=0), dict(threads=0), dict(decoders=0), dict(max_wait=-1)):
        with pytest.raises(ValueError, match=next(iter(kw))): Batcher(Echo(), **kw)


@pytest.mark.alone
def test_waiting_for_a_batch_to_fill():
    "With `max_wait` a batch forms although each picture comes alone"
    b = Batcher(Echo(), max_batch=4, max_wait=2)
    began = time.monotonic()
    futures = [b.submit(named(i)) for i in (1, 2, 3, 4)]
    assert [f.result(10) for f in futures] == list('1234') and b.stats()['batch_sizes'] == {4: 1}
    assert time.monotonic() - began < 2                    # a full batch does not wait
    b.close()
