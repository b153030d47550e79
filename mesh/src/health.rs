//! The gRPC health protocol, generated from `proto/grpc/health/v1/health.proto`.
#![allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, reason = "generated code")]

tonic::include_proto!("grpc.health.v1");
