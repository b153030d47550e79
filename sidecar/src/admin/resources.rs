//! The resources that are in force, as `tulle config POD --diff` reads them.

use std::collections::HashSet;

use tulle_mesh::resources::{MAX_CONTENTS, Resources};

use crate::config::ConfigStore;

/// All of them as JSON ([`Resources`]), and the contents of those that the query names: `resource=KIND/NAME`.
pub fn json(config: &ConfigStore, query: &str) -> String {
    let asked = query.split('&').filter_map(|pair| pair.strip_prefix("resource="));
    let asked: HashSet<&str> = asked.take(MAX_CONTENTS).collect();
    serde_json::to_string(&Resources { resources: config.described(&asked) }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use prost::Message as _;
    use tulle_mesh::proto::resource::Body;
    use tulle_mesh::proto::{self, Resource, ResourceName, ResourceType};
    use tulle_mesh::resources::Described;

    use super::*;
    use crate::config::{Endpoint, Endpoints};

    fn named(kind: ResourceType, name: &str, body: Body) -> Resource {
        let name = ResourceName { r#type: kind.into(), cluster: String::new(), name: name.into() };
        Resource { name: Some(name), version: "v1".into(), body: Some(body), ..Resource::default() }
    }

    fn found(config: &ConfigStore, query: &str) -> Vec<Described> {
        serde_json::from_str::<Resources>(&json(config, query)).unwrap().resources
    }

    #[test]
    fn contents_are_those_that_are_asked_for_and_endpoints_are_shown_as_they_are_used() {
        let config = ConfigStore::new().0;
        let sent = Body::Endpoints(proto::Endpoints::default());
        config.accepted().accept(&named(ResourceType::Endpoints, "shop/web:80", sent));
        let mtls = Body::Mtls(proto::Mtls { shadow_strict: true, ..Default::default() });
        config.accepted().accept(&named(ResourceType::Mtls, "uid", mtls.clone()));
        let name: Arc<str> = "shop/web:80".into();
        let endpoints = vec![Endpoint::at("10.1.0.1:80".parse().unwrap())];
        config.set_endpoints(&name, Endpoints { endpoints, ..Endpoints::default() });

        let bare = found(&config, "");
        let keys: Vec<String> = bare.iter().map(Described::key).collect();
        assert_eq!(keys, ["endpoints/shop/web:80", "mtls/uid"]);
        assert!(bare.iter().all(|described| described.content.is_none() && described.version == "v1"));

        let whole = found(&config, "resource=endpoints/shop/web:80&resource=mtls/uid&resource=route/x");
        let bodies = whole
            .iter()
            .map(|described| Resource::decode(described.bytes().unwrap().as_slice()).unwrap().body.unwrap());
        let bodies: Vec<Body> = bodies.collect();
        let endpoint = proto::Endpoint { address: "10.1.0.1:80".into(), ..Default::default() };
        let used = proto::Endpoints { endpoints: vec![endpoint], ..Default::default() };
        assert_eq!(bodies, [Body::Endpoints(used), mtls]);
    }
}
