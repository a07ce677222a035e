"The API against its own description: requests made from the OpenAPI document, answers compared with it"
import io
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from test_inference import explainer_of
from test_webapp import picture, post

from skin_gradcam.webapp import Settings, create_app


@pytest.fixture(scope='module')
def app(tmp_path_factory):
    app = create_app(explainer_of(tmp_path_factory.mktemp('bundle')/'tiny'), Settings(rate_limit=''))
    yield app
    app.extensions['skin_gradcam'].batcher.close()


@pytest.fixture(scope='module')
def api(app):
    "Generated files are pictures, damaged pictures and bytes"
    good = st.sampled_from([picture(i, fmt) for i, fmt in enumerate(('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF'))])
    schemathesis.openapi.format('binary', st.one_of(good, good, st.binary(), good.map(lambda b: b[:len(b)//2])))
    return schemathesis.openapi.from_wsgi('/api/v1/openapi.json', app)


@pytest.fixture(scope='module')
def document(app): return app.test_client().get('/api/v1/openapi.json').json


@pytest.mark.parametrize('mode', list(schemathesis.GenerationMode), ids=lambda m: m.name.lower())
def test_generated_requests_get_documented_answers(api, mode):
    "No server error; status, media type and body as the document says; what the document forbids is refused"
    counts, positive = Counter(), mode is schemathesis.GenerationMode.POSITIVE
    for found in api.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        def check(case):
            r = case.call_and_validate(excluded_checks=[positive_data_acceptance, negative_data_rejection])
            counts[case.operation.path, r.status_code] += 1
        try: check()
        except Unsatisfiable: assert not positive and operation.method == 'get'
    seen = {status: n for (path, status), n in counts.items() if path == '/api/v1/explain'}
    assert sum(seen.values()) >= 40
    if positive: assert {200, 415, 422} <= set(seen)
    else: assert min(seen) >= 400


def test_the_document_is_valid_openapi(document):
    validate(document)
    assert document['openapi'] == '3.1.0' and document['info']['version']


def fits(document, name, value):
    "Compare a value with a schema among the components"
    Draft202012Validator({'$ref': f'#/components/schemas/{name}', 'components': document['components']}).validate(value)


@pytest.mark.parametrize('maps', ['none', 'png', 'raw'])
def test_real_answers_fit_the_document(app, document, maps):
    r = post(app.test_client(), picture(1), b'no picture', picture(2, 'WEBP'), maps=maps)
    assert r.status_code == 200
    fits(document, 'Answers', r.json)
    first = r.json['answers'][0]
    assert ('layers' in first, 'values' in first['map']) == (maps == 'png', maps == 'raw')


def test_every_member_is_described(app, document):
    "An answer holds nothing that the page /api does not explain"
    first = post(app.test_client(), picture(1), maps='png').json['answers'][0]
    assert set(first) <= set(document['components']['schemas']['Explanation']['properties'])
    model = app.test_client().get('/api/v1/model').json
    fits(document, 'Model', model)
    assert set(model) <= set(document['components']['schemas']['Model']['properties'])


def test_problems_fit_the_document(app, document):
    c = app.test_client()
    for r in (post(c, b'text'), post(c), c.get('/api/v1/explain'), c.get('/api/nothing'), post(c, picture(), side='1')):
        assert r.mimetype == 'application/problem+json'
        fits(document, 'Problem', r.json)
        page = c.get('/api').text
        assert f'id="{r.json["type"].split("#")[1]}"' in page


def test_all_documented_addresses_exist_and_all_others_are_pages(app, document):
    rules = {r.rule for r in app.url_map.iter_rules()}
    pages = {'/', '/answer', '/grad-cam', '/about', '/api', '/demo/<name>.jpg', '/static/<name>'}
    assert rules - pages == set(document['paths'])


def test_a_stream_without_length_is_read_to_its_end(app):
    "A client that sends in chunks (waitress marks such a body as complete)"
    body = b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n' + picture() + b'\r\n--x--\r\n'
    env = {'wsgi.input_terminated': True}
    r = app.test_client().post(
        '/api/v1/explain',
        input_stream=io.BytesIO(body),
        content_type='multipart/form-data; boundary=x',
        environ_overrides=env,
    )
    assert r.status_code == 200
